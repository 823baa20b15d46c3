"""Rows of tokens on a mesh: which device works on which, and in which blocks.

`spread` gives each device its rows and its part of the vocabulary. `walk` puts the live rows of a
device one behind the other and goes over them in blocks, as many as they fill and no more: with 5
live rows of 9 and blocks of 2

    live      . x x . . x . x x
    order     1 2 | 5 7 | 8 0 | 3 4 | 6 -     the first three blocks run, the last two never do

Alternatives, at T rows of which a share f is live. Weights of 0 alone: all T rows are multiplied,
1 / f times the work. One compiled program for each of n sizes: no loop, but n programs, and up to
f + 1 / n of the work where this has f + block / T. A copy of the live states in front: T D values
read and written again; here each block gathers its own rows, and results go back by one gather.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from copsd_jax.runtime import sharding as mesh_lib

VOCABULARY = "tensor"  # the mesh axis that splits the heads' rows


class Axes(NamedTuple):
    """The axes of the mesh in scope that have more than one device.

    Attributes:
      rows: those that split the tokens.
      vocabulary: the one that splits the heads, or None.
    """

    rows: tuple[str, ...]
    vocabulary: str | None


def axes(split_vocabulary: bool) -> Axes:
    """How the mesh of `jax.set_mesh` splits a loss; without a mesh, not at all.

    Args:
      split_vocabulary: False for work that needs whole rows of logits: every device then holds
        whole heads, and the axis that would split them splits the tokens as well.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    rows = tuple(name for name in mesh_lib.BATCH_AXES if sizes.get(name, 1) > 1)
    if sizes.get(VOCABULARY, 1) == 1:
        return Axes(rows, None)
    return Axes(rows, VOCABULARY) if split_vocabulary else Axes((*rows, VOCABULARY), None)


def spread(
    work: Callable[[Any, Any, str | None], tuple[Any, jax.Array | None]],
    rows: Any,
    heads: tuple[jax.Array, ...],
    split_vocabulary: bool,
) -> tuple[Any, jax.Array | None]:
    """work(rows, heads, vocabulary axis) on every device of the mesh in scope.

    Each head comes whole in its width, gathered once, and is a part of the vocabulary or all of it;
    padding rows of it are zeros at the end. Padding rows of `rows` are zeros (and False) as well.

    Args:
      work: returns arrays [rows, ...] and a sum over its rows of a head's shape, or None. It
        reduces over the vocabulary axis by itself.
      rows: arrays [T, ...].
      heads: [V, D].

    Returns:
      work's results for the T rows and the V entries.
    """
    split = axes(split_vocabulary)
    if not split.rows and not split.vocabulary:
        return work(rows, heads, None)
    sizes = jax.sharding.get_abstract_mesh().shape
    tokens, vocabulary = len(jax.tree.leaves(rows)[0]), len(heads[0])
    parts = 1
    for name in split.rows:
        parts *= sizes[name]
    row, head = P(split.rows or None), P(split.vocabulary, None)
    # The sum over rows goes to the devices that keep the parameter, not to all.
    scatter = "fsdp" in split.rows and heads[0].shape[1] % sizes["fsdp"] == 0
    total = P(split.vocabulary, "fsdp" if scatter else None)

    def device(rows: Any, heads: tuple) -> tuple[Any, jax.Array | None]:
        per_row, grad_VD = work(rows, heads, split.vocabulary)
        others = tuple(name for name in split.rows if not (scatter and name == "fsdp"))
        if grad_VD is not None and scatter:
            grad_VD = jax.lax.psum_scatter(grad_VD, "fsdp", scatter_dimension=1, tiled=True)
        if grad_VD is not None and others:
            grad_VD = jax.lax.psum(grad_VD, others)
        return per_row, grad_VD

    run = jax.shard_map(device, in_specs=(row, head), out_specs=(row, total), check_vma=False)
    padded = jax.tree.map(lambda x: pad(x, parts), rows)
    shards = sizes[VOCABULARY] if split.vocabulary else 1
    per_row, grad_VD = run(padded, tuple(pad(x, shards) for x in heads))
    per_row = jax.tree.map(lambda x: x[:tokens], per_row)
    return per_row, None if grad_VD is None else grad_VD[:vocabulary]


def gathered(head_VD: jax.Array, split_vocabulary: bool) -> jax.Array:
    """A head as `spread` hands it to the devices: for loops around it, which gather it once then.

    It takes V D / (devices along the vocabulary) values on each device from there to the last use.
    """
    split = axes(split_vocabulary)
    if not split.rows and not split.vocabulary:
        return head_VD
    shards = jax.sharding.get_abstract_mesh().shape[VOCABULARY] if split.vocabulary else 1
    padded = jax.lax.with_sharding_constraint(_cut(head_VD, shards), P(split.vocabulary, None))
    return padded[: len(head_VD)]


def divided(head_VD: jax.Array, split_vocabulary: bool) -> jax.Array:
    """A head as it is stored where the axis divides the vocabulary, split along both dimensions.

    For heads that come from the parameters to `spread` directly: those that
    `sharding.partition_spec` splits along the width alone would otherwise be brought together whole
    on every device first.
    """
    split = axes(split_vocabulary)
    if not split.vocabulary:
        return head_VD
    shards = jax.sharding.get_abstract_mesh().shape[VOCABULARY]
    return _cut(head_VD, shards)[: len(head_VD)]


def _cut(head_VD: jax.Array, shards: int) -> jax.Array:
    """Padded to a multiple of `shards`, and then split along both dimensions; else as it is."""
    if len(head_VD) % shards == 0:
        return head_VD
    width = head_VD.shape[1]
    fsdp = jax.sharding.get_abstract_mesh().shape["fsdp"]
    padded = pad(head_VD, shards)
    if width % (fsdp * shards) == 0:
        # From the width's parts to the vocabulary's in one exchange between the axis's devices.
        padded = jax.lax.with_sharding_constraint(padded, P(None, ("fsdp", VOCABULARY)))
    return jax.lax.with_sharding_constraint(
        padded, P(VOCABULARY, "fsdp" if width % fsdp == 0 else None)
    )


def pad(x: jax.Array, multiple: int) -> jax.Array:
    """Zeros behind the first axis, to a multiple."""
    missing = -len(x) % multiple
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x


def size(tokens: int, most: int, multiple: int) -> tuple[int, int]:
    """(blocks, rows of a block): as few blocks as `most` rows allow, evenly filled.

    Rows are a multiple of `multiple` where there are more: 36 rows, at most 16, multiples of 8 ->
    3 blocks of 16.
    """
    blocks = max(1, -(-tokens // most))
    rows = -(-tokens // blocks)
    return blocks, rows if rows <= multiple else -(-rows // multiple) * multiple


def walk(
    work: Callable[[Any], tuple[Any, jax.Array | None]],
    rows: Any,
    live_T: jax.Array,
    most: int,
    multiple: int = 1,
) -> tuple[Any, jax.Array | None]:
    """work(block of rows) over the live rows only, in blocks of at most `most`.

    Args:
      work: returns arrays [rows, ...] and a sum over the block, or None. Rows that only fill a
        block up are zeros in its arguments; what it returns for them is not used, but in the sum.
      rows: arrays [T, ...].
      live_T: bool. What other rows hold is never used.

    Returns:
      work's arrays for the T rows, zeros where they are not live, and the sum of the sums.
    """
    rows, live_T = jax.tree.map(jnp.asarray, (rows, live_T))
    tokens = len(live_T)
    blocks, count = size(tokens, most, multiple)
    if blocks == 1:
        padded = jax.tree.map(lambda x: pad(x, count), masked(live_T, rows))
        per_row, total = work(padded)
        return masked(live_T, jax.tree.map(lambda x: x[:tokens], per_row)), total
    live = jnp.sum(live_T, dtype=jnp.int32)
    order_T = jnp.argsort(~live_T, stable=True).astype(jnp.int32)
    order_T = pad(order_T, blocks * count)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), rows)
    per_row, total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work, spec))
    packed = jax.tree.map(lambda x: jnp.zeros((blocks * count, *x.shape[1:]), x.dtype), per_row)

    def block(i: jax.Array, carry: tuple) -> tuple:
        packed, total = carry
        start = i * count
        at = jax.lax.dynamic_slice_in_dim(order_T, start, count)
        here = start + jnp.arange(count, dtype=jnp.int32) < live
        per_row, more = work(masked(here, _take(rows, at)))
        update = jax.lax.dynamic_update_slice_in_dim
        packed = jax.tree.map(lambda all, new: update(all, new, start, 0), packed, per_row)
        return packed, None if total is None else total + more

    blocks_live = (live + (count - 1)) // count
    packed, total = jax.lax.fori_loop(jnp.int32(0), blocks_live, block, (packed, total))
    place_T = jnp.maximum(jnp.cumsum(live_T, dtype=jnp.int32) - 1, 0)
    return masked(live_T, _take(packed, place_T)), total


def _take(tree: Any, at: jax.Array) -> Any:
    """Rows of arrays [T, ...] by numbers that are known to lie within."""
    return jax.tree.map(lambda x: x.at[at].get(mode="promise_in_bounds"), tree)


def masked(live_T: jax.Array, tree: Any) -> Any:
    """Arrays [T, ...] with 0 in the rows that are not live."""

    def mask(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(live_T, range(1, x.ndim)), x, jnp.zeros((), x.dtype))

    return jax.tree.map(mask, tree)
