"""Decode attention for NVIDIA GPUs (Pallas, Triton); the kernel reads only live parts of a cache.

One query token per slot attends to the first `length` entries of its slot. Each program handles one
slot, one key head and one split of the slot's entries (flash-decoding: Dao et al. 2023). Since many
programs share a long slot, the processors are busy even if there are few slots:

    length 300, splits of 128     program    0          1            2           3
                                  entries  0 … 127   128 … 255   256 … 299   none: ends at once

Loads are masked, so that only live entries are read. XLA merges the results of a slot's splits. The
result of a split consists of M · (H + 2) float32 numbers, whereas the split reads 2 · H numbers per
entry. For M = 2 and splits of 512 entries in bfloat16, the results take 1/256 as many bytes as the
entries.

Products run on tensor cores, because plain multiply-adds would be too slow. In bfloat16, the key
and value of an entry have 4 · H bytes per head and need 2 · M · H multiply-adds. A processor of an
H200 loads about 20 bytes per cycle, so loading an entry with H = 128 takes 26 cycles. At 128
multiply-adds per cycle, the products for an entry with H = 128 would take 2 · M cycles. Conversions
and reductions across lanes would take as many cycles as the products. With M = 8, the computation
for an entry would take longer than loading the entry. A product on tensor cores has at least 16
rows. Products of 16 rows need 16 FLOP per byte, and the GPU can do 200 FLOP per byte. Therefore
each product is a `dot` of 16 rows; the last query is repeated to fill these rows. Float32 products
are exact, because they do not use TF32. Two float32 products of 16 rows take 32 cycles per entry,
while loading the 8 · H bytes of an entry takes 52 cycles.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from copsd_jax.attention import decode_cache, visibility

_ROWS = 16  # minimum number of rows of a `dot`
_PROCESSORS = 132  # number of processors of an H100 or H200; an A100 has 108, which is close enough
_PROGRAMS = 4  # number of programs per processor, enough to balance the load


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of the parts into which the kernel divides its work.

    Attributes:
      keys: number of entries per product, a power of two, at least 16.
      split: number of entries per program, a multiple of `keys`.
      warps: number of warps (of 32 threads) per program.
      stages: number of products whose loads are in flight at once.
    """

    keys: int = 64
    split: int = 512
    warps: int = 4
    stages: int = 3


def choose_blocks(q_shape, k_shape, dtype) -> BlockSizes:
    """Chooses splits of 128 to 512 entries; if possible, a processor gets about four programs.

    Slots are assumed to be a quarter full. The keys and values for one product take 16 to 32 KiB,
    and the loads for three products are in flight at once. Two programs on a processor therefore
    have about 100 KiB in flight; 29 KiB (36 GB/s x 800 ns) would be enough to hide the latency.

    Args:
      q_shape: shape of the queries on one device, [J, K, M, H].
      k_shape: shape of the keys on one device, [layers, J, K, A, H].
      dtype: dtype of the cache.
    """
    slots, heads, _, size = q_shape
    length = k_shape[3]
    keys = 32 if size * jnp.dtype(dtype).itemsize > 256 else 64
    wanted = slots * heads * length / 4 / (_PROCESSORS * _PROGRAMS)
    split = decode_cache.LENGTH_MULTIPLE
    while split < min(wanted, 512) and split < length:
        split *= 2
    return BlockSizes(keys, split)


def estimate_cost(q_shape, dtype, mean_length: float) -> pl.CostEstimate:
    """Estimates the FLOPs and bytes of one call, counting M rows per product instead of 16.

    Args:
      q_shape: shape of the queries, [J, K, M, H].
      dtype: dtype of the cache; an int8 entry also has a float32 scale.
      mean_length: number of live entries per slot, averaged over all J slots.
    """
    return pl.CostEstimate(**decode_cache.count_cost(q_shape, dtype, mean_length))


def attend(
    q_JKMH: jax.Array,
    cache: decode_cache.Cache,
    layer: jax.Array,
    length_J: jax.Array,
    *,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> decode_cache.PartialSoftmax:
    """Attends from each slot's queries to the slot's live entries; returns a partial softmax.

    Args:
      q_JKMH: float32 or bfloat16 queries, scaled by H**-0.5 and rotated. M is at most 16, and H is
        a power of two. In registers, entries are converted to the dtype of the queries. Products
        use the dtype of the queries; sums and the softmax use float32.
      cache: the cache, whose length A must be a multiple of 128.
      layer: index of the layer, an int32 scalar.
      length_J: number of live entries in each slot, int32, 0 … A; 0 for a dead slot.
      blocks: block sizes; None means the sizes that `choose_blocks` returns.
      interpret: whether to run the kernel without a GPU.

    Returns:
      The partial softmax over each slot's live entries. For a dead slot, out is 0, top is -1e30 and
      total is 0.

    Raises:
      ValueError: a shape or block size is not supported, or the keys of an int8 cache take
        between 2 and 4 GiB.
    """
    slots, heads, queries, size = q_JKMH.shape
    length = cache.k.shape[3]
    blocks = blocks or choose_blocks(q_JKMH.shape, cache.k.shape, cache.k.dtype)
    _check_attention_shapes(q_JKMH.shape, cache.k, blocks)
    splits = -(-length // blocks.split)
    estimate = estimate_cost(q_JKMH.shape, cache.k.dtype, length / 2)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shape = (splits, slots, heads, queries)
    call: Any = pl.pallas_call(
        functools.partial(_attend_split_kernel, blocks, cache.k_scale is not None),
        grid=(splits, heads, slots),
        out_shape=[float32((*shape, size)), float32(shape), float32(shape)],
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=estimate,
        interpret=interpret,
        name="decode_attention",
    )
    start_S = jnp.arange(splits, dtype=jnp.int32) * blocks.split
    # The text of a compiled program shows the scope name of a Triton call, but not the call's cost
    # estimate. Therefore the estimate is written into the scope name.
    with jax.named_scope(f"cost:{estimate.flops}:{estimate.bytes_accessed}"):
        out, top, total = call(layer.reshape(1), length_J, q_JKMH, *jax.tree.leaves(cache))
    return _merge_splits(out, top, total, start_S[:, None] < length_J[None, :])


def _check_attention_shapes(q_shape: tuple[int, ...], k: jax.Array, blocks: BlockSizes) -> None:
    queries, size, length = q_shape[2], q_shape[3], k.shape[3]
    decode_cache.check_length(length)
    if queries > _ROWS or size < _ROWS or size & (size - 1):
        raise ValueError(
            f"there are {queries} queries per key head and heads of size {size}: at most {_ROWS} "
            f"queries are supported, and the head size must be a power of two, at least {_ROWS}"
        )
    if blocks.keys < _ROWS or blocks.keys & (blocks.keys - 1) or blocks.split % blocks.keys:
        raise ValueError(
            f"blocks.keys is {blocks.keys}, and blocks.split is {blocks.split}: blocks.keys must "
            f"be a power of two, at least {_ROWS}; blocks.split must be a multiple of blocks.keys"
        )
    # An int8 array of up to 4 GiB is addressed with 32-bit offsets. These offsets are signed, so
    # they do not reach beyond 2 GiB. An int8 array of more than 4 GiB gets 64-bit offsets.
    if k.dtype == jnp.int8 and 2**31 < k.size <= 2**32:
        raise ValueError(
            f"an int8 cache of keys has {k.size} bytes on a device: sizes from 2**31 to 2**32 "
            "cannot be addressed; change the number of slots or the cache length"
        )


def _attend_split_kernel(
    blocks: BlockSizes, scaled: bool, layer_1, length_J, q_ref, k_ref, v_ref, *refs
):
    """Computes the partial softmax of one split, for one slot and one key head."""
    scale_refs, (out_ref, top_ref, total_ref) = refs[: 2 * scaled], refs[2 * scaled :]
    split, head, slot = (pl.program_id(axis) for axis in range(3))
    layer, length = layer_1[0], length_J[slot]
    start = split * blocks.split
    stop = jnp.minimum(length, start + blocks.split)
    queries, size = q_ref.shape[2:]
    row_RH, head_RH = (jax.lax.broadcasted_iota(jnp.int32, (_ROWS, size), i) for i in range(2))
    row_R = jax.lax.iota(jnp.int32, _ROWS)

    @pl.when(start < stop)
    def _():
        q_RH = plt.load(q_ref.at[slot, head, jnp.minimum(row_RH, queries - 1), head_RH])

        def add(i, part):
            first = start + i * blocks.keys
            seen_S = first + jax.lax.iota(jnp.int32, blocks.keys) < stop

            def load(ref):
                at = ref.at[layer, slot, head, pl.ds(first, blocks.keys)]
                mask = seen_S[:, None] if len(ref.shape) == 5 else seen_S
                mask = jnp.broadcast_to(mask, at.shape)
                return plt.load(at, mask=mask, other=jnp.zeros((), ref.dtype))

            return _attend_block_gpu(
                part, q_RH, load(k_ref), load(v_ref), [load(r) for r in scale_refs], seen_S
            )

        none_R = jnp.full((_ROWS,), visibility.MASKED_LOGIT, jnp.float32)
        part = jnp.zeros((_ROWS, size), jnp.float32), none_R, jnp.zeros_like(none_R)
        number = jax.lax.div(stop - start + blocks.keys - 1, blocks.keys)
        out_RH, top_R, total_R = jax.lax.fori_loop(0, number, add, part)
        at = split, slot, head
        plt.store(out_ref.at[(*at, row_RH, head_RH)], out_RH, mask=row_RH < queries)
        plt.store(top_ref.at[(*at, row_R)], top_R, mask=row_R < queries)
        plt.store(total_ref.at[(*at, row_R)], total_R, mask=row_R < queries)


def _attend_block_gpu(part, q_RH, k_SH, v_SH, scales_S, seen_S):
    """Adds a block of entries to a partial softmax; unseen entries must have been loaded as 0."""
    out_RH, top_R, total_R = part
    dtype = q_RH.dtype
    logit_RS = decode_cache.multiply(q_RH, k_SH.astype(dtype), 1)
    if scales_S:
        logit_RS = logit_RS * scales_S[0][None, :]
    logit_RS = jnp.where(seen_S[None, :], logit_RS, visibility.MASKED_LOGIT)
    new_R = jnp.maximum(top_R, jnp.max(logit_RS, axis=1))
    shrink_R = jnp.exp(top_R - new_R)
    weight_RS = jnp.exp(logit_RS - new_R[:, None])
    total_R = total_R * shrink_R + jnp.sum(weight_RS, axis=1)
    if scales_S:
        weight_RS = weight_RS * scales_S[1][None, :]
    new_RH = decode_cache.multiply(weight_RS.astype(dtype), v_SH.astype(dtype), 0)
    return out_RH * shrink_R[:, None] + new_RH, new_R, total_R


def _merge_splits(out_SJKMH, top_SJKM, total_SJKM, live_SJ) -> decode_cache.PartialSoftmax:
    """Merges the partial softmaxes of live splits; the results of other splits are undefined."""
    live = live_SJ[:, :, None, None]
    top_SJKM = jnp.where(live, top_SJKM, visibility.MASKED_LOGIT)
    top_JKM = jnp.max(top_SJKM, axis=0)
    scale_SJKM = jnp.where(live, jnp.exp(top_SJKM - top_JKM[None]), 0.0)
    total_JKM = jnp.sum(jnp.where(live, total_SJKM, 0.0) * scale_SJKM, axis=0)
    out_SJKMH = jnp.where(live[..., None], out_SJKMH, 0.0) * scale_SJKM[..., None]
    return decode_cache.PartialSoftmax(jnp.sum(out_SJKMH, axis=0), top_JKM, total_JKM)
