"""Divides token rows among the devices of a mesh, and divides the rows of a device into blocks.

`spread` gives each device its rows and its part of the vocabulary. `walk` packs the live rows of a
device together, and runs only the blocks that contain live rows. In this example, 5 of 9 rows are
live, and a block has 2 rows:

    live      . x x . . x . x x
    order     1 2 | 5 7 | 8 0 | 3 4 | 6 -     the first three blocks run, the last two do not

Let T be the number of rows, and f the fraction of live rows. Three alternatives were rejected:

- Compute all T rows, with weight 0 for rows that are not live. Computing all rows takes 1 / f times
  the work of computing only the live rows.
- Compile n programs for n different numbers of rows. Such a program needs no loop, but computes up
  to a fraction f + 1 / n of all rows. With blocks, the computed fraction is at most f + (rows per
  block) / T.
- Copy the live states before the loop. The copy has T · D values, which must be written and read
  again. With blocks, each block gathers its own rows, and a single gather puts all results back in
  order.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from copsd_jax.runtime import sharding as mesh_lib

VOCABULARY = "tensor"  # the mesh axis that splits the heads' rows
Tree = TypeVar("Tree")  # an array, or a tuple of arrays


class Axes(NamedTuple):
    """The axes of the current mesh that have more than one device.

    Attributes:
      rows: the axes that split the tokens.
      vocabulary: the axis that splits the heads; None if no axis splits the heads.
    """

    rows: tuple[str, ...]
    vocabulary: str | None


def find_axes(split_vocabulary: bool) -> Axes:
    """Finds the axes of the current mesh (`jax.set_mesh`) that split the work of a loss.

    Without a mesh, no axis splits the work.

    Args:
      split_vocabulary: False for work that needs whole rows of logits. If False, every device has
        whole heads, and the axis that would otherwise split the heads also splits the tokens.
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
    """Runs `work(rows, heads, vocabulary axis)` on every device of the current mesh.

    The heads are gathered once, along their width. The heads passed to `work` cover the whole
    vocabulary, or only this device's part of the vocabulary. Heads and `rows` are padded at the
    end. Padding consists of zeros, or of False in bool arrays.

    Args:
      work: function that returns arrays [rows, ...], and either None or a sum over the rows, in the
        shape of a head. The function must do all reductions over the vocabulary axis itself.
      rows: arrays [T, ...].
      heads: arrays [V, D].
      split_vocabulary: see `find_axes`.

    Returns:
      The arrays of `work` for all T rows, [T, ...], and the sum [V, D] (None if `work` returns no
      sum).
    """
    axes = find_axes(split_vocabulary)
    if not axes.rows and not axes.vocabulary:
        return work(rows, heads, None)
    sizes = jax.sharding.get_abstract_mesh().shape
    tokens, vocabulary = len(jax.tree.leaves(rows)[0]), len(heads[0])
    parts = math.prod(sizes[name] for name in axes.rows)
    row, head = P(axes.rows or None), P(axes.vocabulary, None)
    # The sum over rows is scattered to the devices that store the head.
    scatter = "fsdp" in axes.rows and heads[0].shape[1] % sizes["fsdp"] == 0
    total = P(axes.vocabulary, "fsdp" if scatter else None)

    def device(rows: Any, heads: tuple) -> tuple[Any, jax.Array | None]:
        per_row, grad_VD = work(rows, heads, axes.vocabulary)
        others = tuple(name for name in axes.rows if not (scatter and name == "fsdp"))
        if grad_VD is not None and scatter:
            grad_VD = jax.lax.psum_scatter(grad_VD, "fsdp", scatter_dimension=1, tiled=True)
        if grad_VD is not None and others:
            grad_VD = jax.lax.psum(grad_VD, others)
        return per_row, grad_VD

    run = jax.shard_map(device, in_specs=(row, head), out_specs=(row, total), check_vma=False)
    padded = jax.tree.map(lambda x: pad(x, parts), rows)
    shards = sizes[VOCABULARY] if axes.vocabulary else 1
    per_row, grad_VD = run(padded, tuple(pad(x, shards) for x in heads))
    per_row = jax.tree.map(lambda x: x[:tokens], per_row)
    return per_row, None if grad_VD is None else grad_VD[:vocabulary]


def gather_head(head_VD: jax.Array, split_vocabulary: bool) -> jax.Array:
    """Gathers a head [V, D] into the form in which `spread` gives it to the devices.

    Call this function before a loop around `spread`; otherwise `spread` gathers the head in every
    iteration. Until its last use, the gathered head takes the memory of V · D / n values on each
    device, where n is the number of devices that split the vocabulary.
    """
    axes = find_axes(split_vocabulary)
    if not axes.rows and not axes.vocabulary:
        return head_VD
    shards = jax.sharding.get_abstract_mesh().shape[VOCABULARY] if axes.vocabulary else 1
    place = P(axes.vocabulary, None)
    padded = jax.lax.with_sharding_constraint(_split_padded(head_VD, shards), place)
    return padded[: len(head_VD)]


def split_head(head_VD: jax.Array, split_vocabulary: bool) -> jax.Array:
    """Splits a head [V, D] along both dimensions if the mesh splits the vocabulary.

    Call this function on a head that comes unchanged from the parameters, before passing that head
    to `spread`. `sharding.partition_spec` splits some heads only along the width. Without
    `split_head`, every device would first gather the whole head.
    """
    if not find_axes(split_vocabulary).vocabulary:
        return head_VD
    shards = jax.sharding.get_abstract_mesh().shape[VOCABULARY]
    return _split_padded(head_VD, shards)[: len(head_VD)]


def _split_padded(head_VD: jax.Array, shards: int) -> jax.Array:
    """Pads and splits a head, or returns it unchanged if `shards` divides its number of rows."""
    if len(head_VD) % shards == 0:
        return head_VD
    width = head_VD.shape[1]
    fsdp = jax.sharding.get_abstract_mesh().shape["fsdp"]
    padded = pad(head_VD, shards)
    if width % (fsdp * shards) == 0:
        # Because the width is first split over both axes, the final split needs only one exchange
        # between the devices of the axis `tensor`.
        padded = jax.lax.with_sharding_constraint(padded, P(None, ("fsdp", VOCABULARY)))
    place = P(VOCABULARY, "fsdp" if width % fsdp == 0 else None)
    return jax.lax.with_sharding_constraint(padded, place)


def pad(x: jax.Array, multiple: int) -> jax.Array:
    """Pads the first axis of [rows, ...] with zeros, to the next multiple of `multiple` rows."""
    missing = -len(x) % multiple
    return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x


def divide_evenly(tokens: int, most: int, multiple: int) -> tuple[int, int]:
    """Divides tokens evenly into the smallest number of blocks of at most `most` rows.

    For example, 36 tokens with `most` 16 and `multiple` 8 give 3 blocks of 16 rows.

    Returns:
      The number of blocks, and the number of rows in a block. If a block would have more than
      `multiple` rows, the number of rows is rounded up to a multiple of `multiple`.
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
    """Calls `work` on the live rows only, in blocks of at most `most` rows.

    Args:
      work: function that returns arrays [rows, ...], and a sum over the block (or None). In the
        arguments of `work`, the padding rows of a block are zeros. Padding rows are dropped from
        the arrays that `work` returns, but not from the sum that `work` returns.
      rows: arrays [T, ...].
      live_T: bool; rows that are not live may contain anything.
      most: maximum number of rows in a block.
      multiple: see `divide_evenly`.

    Returns:
      The arrays of `work` for all T rows, with zeros for rows that are not live; and the sum over
      all blocks (None if `work` returns no sum).
    """
    rows, live_T = jax.tree.map(jnp.asarray, (rows, live_T))
    tokens = len(live_T)
    blocks, count = divide_evenly(tokens, most, multiple)
    if blocks == 1:
        # The live rows need no packing, because one block contains all rows.
        padded = jax.tree.map(lambda x: pad(x, count), mask_rows(live_T, rows))
        per_row, total = work(padded)
        return mask_rows(live_T, jax.tree.map(lambda x: x[:tokens], per_row)), total
    live = jnp.sum(live_T, dtype=jnp.int32)
    order_T = pad(jnp.argsort(~live_T, stable=True).astype(jnp.int32), blocks * count)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), rows)
    per_row, total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work, spec))
    packed = jax.tree.map(lambda x: jnp.zeros((blocks * count, *x.shape[1:]), x.dtype), per_row)

    def block(i: jax.Array, carry: tuple) -> tuple:
        packed, total = carry
        start = i * count
        at = jax.lax.dynamic_slice_in_dim(order_T, start, count)
        here = start + jnp.arange(count, dtype=jnp.int32) < live
        per_row, more = work(mask_rows(here, _take_token_rows(rows, at)))
        update = jax.lax.dynamic_update_slice_in_dim
        packed = jax.tree.map(lambda every, new: update(every, new, start, 0), packed, per_row)
        return packed, None if total is None else total + more

    blocks_live = (live + (count - 1)) // count
    packed, total = jax.lax.fori_loop(jnp.int32(0), blocks_live, block, (packed, total))
    place_T = jnp.maximum(jnp.cumsum(live_T, dtype=jnp.int32) - 1, 0)
    return mask_rows(live_T, _take_token_rows(packed, place_T)), total


def _take_token_rows(tree: Tree, at: jax.Array) -> Tree:
    """Returns the rows with indices `at` from arrays [T, ...]; the indices must be in bounds."""
    return jax.tree.map(lambda x: x.at[at].get(mode="promise_in_bounds"), tree)


def mask_rows(live_T: jax.Array, tree: Tree) -> Tree:
    """Returns the arrays [T, ...] with 0 in the rows that are not live."""

    def mask(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(live_T, range(1, x.ndim)), x, jnp.zeros((), x.dtype))

    return jax.tree.map(mask, tree)
