"""Attention of whole rows of tokens: training, scoring, prefill (not decoding).

`visibility` says which keys a token sees. One softmax goes over all of them, and nothing is
repeated for rows or queries.

`portable` is plain array code. Blocks of queries meet the keys up to their own end only, so that
about half of the products are left out; what the backward pass needs are the output and the
log-sum-exp of each query (FlashAttention-2, arXiv 2307.08691, section 3.1), never the weights.
`splash` is jax's kernel for TPU (row_attention_splash.py), `attend_cudnn` NVIDIA's through
jax.nn.dot_product_attention.

Shapes: B rows, L tokens of a row, Q queries of a block, S keys, K key heads, M queries per key
head, H head size, P keys of the prefix.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from copsd_jax.attention import visibility
from copsd_jax.runtime import sharding

IMPLEMENTATIONS = ("portable", "splash", "cudnn")
CPU_QUERY_BLOCK = 64  # queries of a block on CPU; 32 and 128 cost a tenth more at SmolLM2's shape
MAX_RANGES = 8  # ranges of queries, each with a range of keys of its own; more save little
SMALL_WORK = 2**24  # L L N H of a row below which small blocks cost more to compile than they save
SMALL_WORK_BLOCK = 512  # queries at once in rows below that
MAX_RANGES_LARGE_BLOCKS = 2  # of large blocks: the compiler for TPU takes 10 to 30 s for each range

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend(
    q_BLKMH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    rows: visibility.Visibility,
    prefix: visibility.Prefix | None,
    implementation: str,
    block: int,
) -> jax.Array:
    """softmax(q k^T) v over the keys that each token sees: [B, L, K, M, H] in v's dtype.

    Differentiable in q, k, v and the prefix, in reverse mode. On a mesh (`jax.set_mesh`) the
    kernels' rows are split over its batch axes and key heads over `tensor`, where these divide
    them; the portable form is left to the compiler.

    Args:
      q_BLKMH: scaled and rotated.
      block: queries of a block of the portable form; more where rows are small.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"model.attention is {implementation!r}: the choices are {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "portable":
        work = math.prod(q_BLKMH.shape[1:]) * q_BLKMH.shape[1]
        block = block if work >= SMALL_WORK else max(block, SMALL_WORK_BLOCK)
        return _attend_portable(block, q_BLKMH, k_BLKH, v_BLKH, rows, prefix)
    if implementation == "splash":
        # Pallas takes its time, and a CPU does without.
        from copsd_jax.attention import row_attention_splash

        return attend_on_mesh(row_attention_splash.attend, q_BLKMH, k_BLKH, v_BLKH, rows, prefix)
    return attend_on_mesh(attend_cudnn, q_BLKMH, k_BLKH, v_BLKH, rows, prefix)


def attend_on_mesh(
    here: Callable[..., jax.Array], q_BLKMH, k_BLKH, v_BLKH, rows: visibility.Visibility, prefix
):
    """`here`, each device with its own rows and heads."""
    context: Any = jax.sharding.get_abstract_mesh()
    if context.empty or context.size == 1:
        return here(q_BLKMH, k_BLKH, v_BLKH, rows, prefix)
    row = sharding.BATCH if q_BLKMH.shape[0] % sharding.batch_shards(context) == 0 else None
    head = "tensor" if k_BLKH.shape[2] % context.shape["tensor"] == 0 else None
    place, each = PartitionSpec(row, None, head), PartitionSpec(row)
    shared: Any = PartitionSpec(None, head)
    return jax.shard_map(
        here,
        in_specs=(place, place, place, each, shared), out_specs=place, check_vma=False,
    )(q_BLKMH, k_BLKH, v_BLKH, rows, prefix)  # fmt: skip


# --- portable ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_portable(
    block: int,
    q_BLKMH,
    k_BLKH,
    v_BLKH,
    rows: visibility.Visibility,
    prefix: visibility.Prefix | None,
):
    return _forward(block, q_BLKMH, k_BLKH, v_BLKH, rows, prefix)[0]


def _forward(
    block: int,
    q_BLKMH,
    k_BLKH,
    v_BLKH,
    rows: visibility.Visibility,
    prefix: visibility.Prefix | None,
):
    """The output, and what the backward pass needs."""
    index_L = jnp.arange(q_BLKMH.shape[1], dtype=jnp.int32)
    outs, lses = [], []
    for start, stop in split_queries(q_BLKMH.shape[1], block):
        keys = _VisibleKeys(k_BLKH[:, :stop].swapaxes(1, 2), v_BLKH[:, :stop].swapaxes(1, 2),
                     rows.segments_BL[:, :stop], prefix)  # fmt: skip
        parts = jax.tree.map(lambda x: x[:, start:stop], (q_BLKMH, rows, index_L[None]))  # noqa: B023
        _, (out, lse) = _scan_blocks(functools.partial(_forward_block, keys), (), parts, block)
        outs.append(out)
        lses.append(lse)
    out_BLKMH = checkpoint_name(jnp.concatenate(outs, 1), visibility.CHECKPOINT_NAME)
    lse_BLKM = checkpoint_name(jnp.concatenate(lses, 1), visibility.CHECKPOINT_NAME)
    return out_BLKMH, (q_BLKMH, k_BLKH, v_BLKH, rows, prefix, out_BLKMH, lse_BLKM)


def _backward(block: int, kept, g_BLKMH):
    q_BLKMH, k_BLKH, v_BLKH, rows, prefix, out_BLKMH, lse_BLKM = kept
    length = q_BLKMH.shape[1]
    index_L = jnp.arange(length, dtype=jnp.int32)
    f32 = jnp.float32
    delta_BLKM = jnp.sum(g_BLKMH.astype(f32) * out_BLKMH.astype(f32), axis=-1)
    whole = (q_BLKMH, g_BLKMH, lse_BLKM, delta_BLKM, rows, index_L[None])
    slopes, totals = [], []
    for start, stop in split_queries(length, block):
        keys = _VisibleKeys(k_BLKH[:, :stop].swapaxes(1, 2), v_BLKH[:, :stop].swapaxes(1, 2),
                     rows.segments_BL[:, :stop], prefix)  # fmt: skip
        parts = jax.tree.map(lambda x: x[:, start:stop], whole)  # noqa: B023
        total, slope = _scan_blocks(
            functools.partial(_backward_block, keys), _zero_gradients(keys), parts, block
        )
        slopes.append(slope)
        totals.append(total)

    def summed(parts):  # [B, K, H, S] of growing S -> [B, L, K, H]
        pad = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, length - x.shape[3]),))  # noqa: E731
        return functools.reduce(jnp.add, map(pad, parts)).transpose(0, 3, 1, 2)

    of_k, of_v = (summed([total[i] for total in totals]).astype(k_BLKH.dtype) for i in (0, 1))
    of_prefix = None
    if prefix is not None:  # [K, H, P] -> [P, K, H]
        whole = [functools.reduce(jnp.add, [total[i] for total in totals]) for i in (2, 3)]
        of_prefix = visibility.Prefix(*(x.transpose(2, 0, 1).astype(k_BLKH.dtype) for x in whole))
    return jnp.concatenate(slopes, 1), of_k, of_v, None, of_prefix


_attend_portable.defvjp(_forward, _backward)


class _VisibleKeys(NamedTuple):
    """What a range of queries attends to."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    segments_BS: jax.Array
    prefix: visibility.Prefix | None


def split_queries(length: int, block: int) -> list[tuple[int, int]]:
    """A few ranges of whole blocks: 11 in blocks of 4 -> (0, 4), (4, 8), (8, 11)."""
    width = block * -(
        -length // (block * (MAX_RANGES if block <= CPU_QUERY_BLOCK else MAX_RANGES_LARGE_BLOCKS))
    )
    return [(start, min(start + width, length)) for start in range(0, length, width)]


def _scan_blocks(one: Callable[..., Any], carry: Any, parts: Any, block: int) -> Any:
    """`one(carry, part)` for each block of queries, as a scan does it, along axis 1 of `parts`."""
    length = max(x.shape[1] for x in jax.tree.leaves(parts))
    if length <= block:
        return one(carry, parts)
    n = -(-length // block)

    def split(x):  # [B, L, ...] -> [n, B, block, ...]
        x = jnp.pad(x, ((0, 0), (0, n * block - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], n, block, *x.shape[2:]), 1, 0)

    def joined(x):  # without what the queries that fill the last block find
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], n * block, *x.shape[3:])[:, :length]

    carry, out = jax.lax.scan(one, carry, jax.tree.map(split, parts))
    return carry, jax.tree.map(joined, out)


def _compute_logits(keys: _VisibleKeys, q_BKQMH, query: visibility.Visibility, index_1Q):
    """Those of the own keys [B, K, Q, M, S], and of the prefix [K, B, Q, M, P] or None."""
    own = _product("bkqmh,bksh->bkqms", q_BKQMH, keys.k_BKSH)
    visible = visibility.visible_keys(query, index_1Q[0], keys.segments_BS)
    # Added, not selected: a sum is one pass, whatever it is fused with.
    own = (
        own
        + jnp.where(visible, jnp.float32(0), jnp.float32(visibility.MASKED_LOGIT))[:, None, :, None]
    )
    if keys.prefix is None:
        return own, None
    # Axes in the order that the product gives: only arrays without keys are ever transposed.
    return own, _product("kbqmh,pkh->kbqmp", q_BKQMH.swapaxes(0, 1), keys.prefix.k_PKH)


def _forward_block(keys: _VisibleKeys, carry, part):
    # The mask must wait for q: else, as it depends on constants of the loops only, masks of all
    # blocks are made ahead of the layers when a gradient is taken.
    q, query, index = jax.lax.optimization_barrier(part)
    q, dtype = q.swapaxes(1, 2), keys.v_BKSH.dtype
    own, shared = _compute_logits(keys, q, query, index)
    top_BKQM = own.max(axis=-1)
    if shared is not None:
        top_BKQM = jnp.maximum(top_BKQM, shared.max(axis=-1).swapaxes(0, 1))
    own = jnp.exp(own - top_BKQM[..., None])
    total_BKQM = own.sum(axis=-1)
    out = _product("bkqms,bksh->bkqmh", own.astype(dtype), keys.v_BKSH)
    if shared is not None:
        assert keys.prefix is not None
        shared = jnp.exp(shared - top_BKQM.swapaxes(0, 1)[..., None])
        total_BKQM = total_BKQM + shared.sum(axis=-1).swapaxes(0, 1)
        more = _product("kbqmp,pkh->kbqmh", shared.astype(dtype), keys.prefix.v_PKH)
        out = out + more.swapaxes(0, 1)
    out = (out / total_BKQM[..., None]).astype(dtype)
    return carry, (out.swapaxes(1, 2), (top_BKQM + jnp.log(total_BKQM)).swapaxes(1, 2))


def _zero_gradients(keys: _VisibleKeys) -> tuple[jax.Array, ...]:
    """Zeros: of keys and values [B, K, H, S], of the prefix [K, H, P]."""
    batch, heads, count, size = keys.k_BKSH.shape
    shapes = [(batch, heads, size, count)] * 2
    if keys.prefix is not None:
        shapes += [(heads, size, keys.prefix.k_PKH.shape[0])] * 2
    return tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)


def _backward_block(keys: _VisibleKeys, carry, part):
    """Gradient to the block's queries; those to the keys are added to `carry`.

    The small factor comes first in products over queries: XLA on CPU transposes the first one in
    memory, which should not be the weights.
    """
    q, g, lse, delta, query, index = jax.lax.optimization_barrier(part)
    dtype = keys.v_BKSH.dtype
    q, g, lse, delta = (x.swapaxes(1, 2) for x in (q, g, lse, delta))
    own, shared = _compute_logits(keys, q, query, index)
    weight = jnp.exp(own - lse[..., None])
    slope = weight * (_product("bkqmh,bksh->bkqms", g, keys.v_BKSH) - delta[..., None])
    slope = slope.astype(dtype)
    more = [
        _product("bkqmh,bkqms->bkhs", q, slope),
        _product("bkqmh,bkqms->bkhs", g, weight.astype(dtype)),
    ]
    out = _product("bkqms,bksh->bkqmh", slope, keys.k_BKSH)
    if shared is not None:
        assert keys.prefix is not None
        q, g, lse, delta = (x.swapaxes(0, 1) for x in (q, g, lse, delta))
        weight = jnp.exp(shared - lse[..., None])
        slope = weight * (_product("kbqmh,pkh->kbqmp", g, keys.prefix.v_PKH) - delta[..., None])
        slope = slope.astype(dtype)
        more += [
            _product("kbqmh,kbqmp->khp", q, slope),
            _product("kbqmh,kbqmp->khp", g, weight.astype(dtype)),
        ]
        out = out + _product("kbqmp,pkh->kbqmh", slope, keys.prefix.k_PKH).swapaxes(0, 1)
    carry = tuple(a + b for a, b in zip(carry, more, strict=True))
    return carry, out.astype(dtype).swapaxes(1, 2)


# --- cudnn ------------------------------------------------------------------------------------


def attend_cudnn(
    q_BLKMH,
    k_BLKH,
    v_BLKH,
    rows: visibility.Visibility,
    prefix: visibility.Prefix | None,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Which keys are seen goes in as a mask [B, 1, L, P + L], exact for every kind of row.

    Lengths become even, without which cuDNN takes no gradient under a mask.

    Args:
      implementation: 'xla' computes the same without a GPU (tests).
    """
    B, L, K, M, H = q_BLKMH.shape
    even = lambda x: jnp.pad(x, ((0, 0), (0, L % 2)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    q, k, v = even(q_BLKMH.reshape(B, L, K * M, H)), even(k_BLKH), even(v_BLKH)
    parents = None if rows.parents_BL is None else even(rows.parents_BL)
    wider = visibility.Visibility(even(rows.segments_BL), parents)
    index = jnp.arange(L + L % 2, dtype=jnp.int32)
    visible = visibility.visible_keys(wider, index, wider.segments_BL)
    if prefix is not None:
        P = prefix.k_PKH.shape[0]
        there = (jnp.arange(P + P % 2, dtype=jnp.int32) < P)[None, None]
        there = jnp.broadcast_to(there, (*visible.shape[:2], P + P % 2))
        visible = jnp.concatenate([there, visible], axis=2)
        shared = [jnp.pad(x, ((0, P % 2), (0, 0), (0, 0)))[None] for x in prefix]
        k, v = (
            jnp.concatenate([jnp.broadcast_to(x, (B, *x.shape[1:])), own], axis=1)
            for x, own in zip(shared, (k, v), strict=True)
        )
    out = jax.nn.dot_product_attention(
        q, k, v, mask=visible[:, None], scale=1.0, is_causal=prefix is None,
        implementation=implementation,
    )  # fmt: skip
    return checkpoint_name(out, visibility.CHECKPOINT_NAME)[:, :L].reshape(B, L, K, M, H)
