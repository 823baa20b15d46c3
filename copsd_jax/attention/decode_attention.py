"""Decode attention: one new token per slot attends to the live part of a cache.

A cache [layers, J, K, A, H] has J slots. Each slot holds the keys and values of one text. The first
`length` entries of a slot are live, and the rest are garbage. A decode step writes one entry into
each live slot. The new token of a slot then attends to all live entries of the slot, including the
new entry:

    slot  length   blocks of 64 entries that are read
      0      70    0 1
      1       0    none: a dead slot
      2      64    0

`dense` reads the whole cache and masks the entries that are not live; tests compare the other
implementations with `dense`. `blocks` processes the list of live (slot, block) pairs in groups, in
plain XLA. `blocks` runs on every platform, and its cost is proportional to the number of live
entries. The kernels `pallas_tpu` and `pallas_gpu` read live blocks directly from the cache, whereas
`blocks` copies live blocks first. All implementations return the numerator, the maximum and the sum
of a softmax separately, so that the caller can add the keys of a shared prefix.

An int8 cache has one float32 scale per entry and head; each scale is chosen so that the largest
magnitude among the entry's int8 numbers is 127.

Shapes: J slots, K key heads, M queries per key head, A entries per slot, W (slot, block) pairs per
group; H is the head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from copsd_jax.attention import decode_cache, visibility
from copsd_jax.runtime import sharding

# On CPU, blocks of 32 entries are a fifth slower than blocks of 64 entries, and blocks of 128
# entries are no faster than blocks of 64 entries.
BLOCK = 64  # number of entries per block in `blocks`
CACHE_LENGTH_MULTIPLE = decode_cache.LENGTH_MULTIPLE
Cache = decode_cache.Cache
PartialSoftmax = decode_cache.PartialSoftmax

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def create_cache(layers: int, slots: int, heads: int, length: int, size: int, dtype: Any) -> Cache:
    """Creates a cache of zeros.

    Args:
      layers: number of layers.
      slots: number of slots, J.
      heads: number of key heads, K.
      length: number of entries per slot, A.
      size: head size, H.
      dtype: float32, bfloat16 or int8.
    """
    shape = (layers, slots, heads, length, size)
    arrays = [(shape, dtype)] * 2
    if jnp.dtype(dtype) == jnp.int8:
        arrays += [(shape[:-1], jnp.float32)] * 2
    # Each array needs its own buffer, because caches are donated.
    return Cache(*(jnp.zeros(*array) for array in arrays))


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises x [..., H] to int8 [..., H] and float32 scales [...], so that x ≈ int8 · scale."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), jnp.float32(1e-30)) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def convert_entries(cache: Cache, k: jax.Array, v: jax.Array) -> Cache:
    """Converts keys and values to the dtypes of a cache.

    Args:
      cache: a cache that has the wanted dtypes.
      k: keys [..., H].
      v: values [..., H].

    Returns:
      A Cache that holds k and v [..., H], and scales [...] if the cache is int8.
    """
    if cache.k_scale is None:
        return Cache(k.astype(cache.k.dtype), v.astype(cache.v.dtype))
    (k, k_scale), (v, v_scale) = quantise(k), quantise(v)
    return Cache(k, v, k_scale, v_scale)


def write_and_attend(
    q_JKMH: jax.Array,
    k_JKH: jax.Array,
    v_JKH: jax.Array,
    cache: Cache,
    layer: jax.Array,
    index_J: jax.Array,
    implementation: str,
) -> tuple[PartialSoftmax, Cache]:
    """Writes entry `index` of each slot, then attends to entries 0 … `index` of the slot.

    On a mesh (`jax.set_mesh`), slots are split over the batch axes. If `tensor` divides the number
    of key heads, key heads are split over `tensor`. Each device reads and writes only its own slots
    and heads.

    Args:
      q_JKMH: queries, scaled and rotated, in compute dtype.
      k_JKH: new keys, rotated.
      v_JKH: new values.
      cache: the cache; it is updated in place if it is donated or carried by a loop.
      layer: index of the layer, an int32 scalar.
      index_J: index of the new entry in each slot, int32; negative for a dead slot, which is
        neither written nor read.
      implementation: a key of IMPLEMENTATIONS.

    Returns:
      The partial softmax over each slot's own entries, and the updated cache.

    Raises:
      ValueError: the implementation is unknown, or the batch axes of the mesh do not divide the
        number of slots.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"decode attention is {implementation!r}: the choices are {', '.join(IMPLEMENTATIONS)}"
        )
    local = functools.partial(_write_and_attend, implementation)
    context = jax.sharding.get_abstract_mesh()
    if context.empty or context.size == 1:
        return local(q_JKMH, k_JKH, v_JKH, cache, layer, index_J)
    slot, head = find_mesh_axes(context, *cache.k.shape[1:3])
    place: Any = PartitionSpec(slot, head)
    inside = PartitionSpec(None, slot, head)
    return jax.shard_map(
        local,
        in_specs=(place, place, place, inside, PartitionSpec(), PartitionSpec(slot)),
        out_specs=(PartialSoftmax(place, place, place), inside),
        check_vma=False,
    )(q_JKMH, k_JKH, v_JKH, cache, layer, index_J)


def find_mesh_axes(shape: Any, slots: int, heads: int) -> tuple[tuple[str, ...], str | None]:
    """Finds the mesh axes that split the slots and the key heads.

    Args:
      shape: a mesh, or an abstract mesh.
      slots: number of slots, J.
      heads: number of key heads, K. If `tensor` does not divide K, the heads are replicated.

    Raises:
      ValueError: the batch axes do not divide the number of slots.
    """
    shards = sharding.batch_shards(shape)
    if slots % shards:
        raise ValueError(f"there are {slots} slots: the mesh needs a multiple of {shards}")
    _, slot, head, *_ = sharding.partition_spec("cache/k", (1, slots, heads, 1, 1), shape)
    return slot, head


def _write_and_attend(
    implementation: str, q, k, v, cache: Cache, layer, index_J
) -> tuple[PartialSoftmax, Cache]:
    """Runs `write_and_attend` on one device."""
    write = _write_cache_entries_tpu if implementation == "pallas_tpu" else _scatter_cache_entries
    cache = write(cache, convert_entries(cache, k, v), layer, index_J)
    return IMPLEMENTATIONS[implementation](q, cache, layer, index_J + 1), cache


def _scatter_cache_entries(cache: Cache, new: Cache, layer: jax.Array, index_J: jax.Array) -> Cache:
    rows_J = jnp.arange(index_J.shape[0], dtype=jnp.int32)
    # A dead slot gets index A, because writes at index A are dropped. A negative index would count
    # from the end.
    at_J = jnp.where(index_J < 0, cache.k.shape[3], index_J)
    return jax.tree.map(
        lambda whole, new: whole.at[layer, rows_J, :, at_J].set(new, mode="drop"), cache, new
    )


def _write_cache_entries_tpu(
    cache: Cache, new: Cache, layer: jax.Array, index_J: jax.Array
) -> Cache:
    """Writes entries with a kernel; XLA's scatter would copy the whole cache to a new layout."""
    # This import is lazy, because Pallas is slow to import and a CPU run does not need Pallas.
    from copsd_jax.attention import decode_attention_tpu

    leaves = jax.tree.leaves(cache), jax.tree.leaves(new)
    return Cache(*decode_attention_tpu.write_cache_entries(*leaves, layer, index_J))


# --- dense ------------------------------------------------------------------------------------


def _dense(q_JKMH, cache: Cache, layer, length_J) -> PartialSoftmax:
    """Attends to all entries of the layer, and masks the entries that are not live."""
    take = jax.lax.dynamic_index_in_dim
    one = jax.tree.map(lambda x: take(x, layer, 0, keepdims=False), cache)
    index_A = jnp.arange(cache.k.shape[3], dtype=jnp.int32)
    return _attend_partially(q_JKMH, one, index_A[None, :] < length_J[:, None])


def _attend_partially(q_WKMH: jax.Array, block: Cache, seen_WS: jax.Array) -> PartialSoftmax:
    """Attends from queries [W, K, M, H] to the entries [W, K, S, H] at the same index along W."""
    dtype = q_WKMH.dtype
    logit = _product("wkmh,wksh->wkms", q_WKMH, block.k.astype(dtype))
    if block.k_scale is not None:
        logit = logit * block.k_scale[:, :, None]
    seen = seen_WS[:, None, None]
    logit = jnp.where(seen, logit, jnp.float32(visibility.MASKED_LOGIT))
    top = jnp.max(logit, axis=-1)
    weight = jnp.where(seen, jnp.exp(logit - top[..., None]), jnp.float32(0))
    total = jnp.sum(weight, axis=-1)
    if block.v_scale is not None:
        weight = weight * jnp.where(seen, block.v_scale[:, :, None], jnp.float32(0))
    # The values of entries that are not live are set to 0. These values may be infinite or NaN, and
    # a weight of 0 times infinity or NaN would be NaN.
    v = jnp.where(seen_WS[:, None, :, None], block.v, jnp.zeros((), block.v.dtype)).astype(dtype)
    return PartialSoftmax(_product("wkms,wksh->wkmh", weight.astype(dtype), v), top, total)


# --- blocks -----------------------------------------------------------------------------------


def list_live_blocks(length_J: jax.Array, per_slot: int, block: int) -> tuple[jax.Array, ...]:
    """Lists the live (slot, block) pairs, slot by slot.

    For example, with blocks of 64, the lengths (70, 0, 64) give the 3 pairs (0, 0), (0, 1), (2, 0),
    followed by garbage.

    Args:
      length_J: number of live entries in each slot, int32.
      per_slot: number of blocks in a slot.
      block: number of entries in a block.

    Returns:
      slot_X and block_X, both int32 [J · per_slot], and the number of live pairs, an int32 scalar.
    """
    number_J = -(-length_J // block)
    end_J = jnp.cumsum(number_J)
    index_X = jnp.arange(length_J.shape[0] * per_slot, dtype=jnp.int32)
    slot_X = jnp.searchsorted(end_J, index_X, side="right", method="compare_all")
    slot_X = jnp.minimum(slot_X, length_J.shape[0] - 1).astype(jnp.int32)
    return slot_X, index_X - (end_J - number_J)[slot_X], end_J[-1]


def _attend_live_blocks(q_JKMH, cache: Cache, layer, length_J) -> PartialSoftmax:
    """Attends to W live (slot, block) pairs at a time; the cost depends on the number of pairs."""
    slots, _, length, size = cache.k.shape[1:]
    per_slot = length // BLOCK
    # With four pairs per slot, a group is large enough to make up for the cost of starting a
    # product, and small enough that the last group is mostly full.
    group = min(max(16, 4 * slots), slots * per_slot)
    slot_X, block_X, live = list_live_blocks(length_J, per_slot, BLOCK)
    pad = (0, -slot_X.shape[0] % group)
    slot_X, block_X = jnp.pad(slot_X, pad), jnp.pad(block_X, pad)
    split = lambda x: x.reshape(*x.shape[:3], per_slot, BLOCK, *x.shape[4:])  # noqa: E731
    cut = jax.tree.map(split, cache)

    def some(carry: tuple[jax.Array, PartialSoftmax]) -> tuple[jax.Array, PartialSoftmax]:
        first, sofar = carry
        slot_W, block_W = (jax.lax.dynamic_slice(x, (first,), (group,)) for x in (slot_X, block_X))
        live_W = first + jnp.arange(group, dtype=jnp.int32) < live
        index_WS = block_W[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None]
        seen_WS = (index_WS < length_J[slot_W][:, None]) & live_W[:, None]
        here = jax.tree.map(lambda x: x[layer, slot_W, :, block_W], cut)
        part = _attend_partially(q_JKMH[slot_W], here, seen_WS)
        top_JKM = sofar.top_JKM.at[slot_W].max(part.top_JKM)
        # Sums are added by scatter, because a slot may have several blocks in one group.
        scale_WKM = jnp.exp(part.top_JKM - top_JKM[slot_W])
        scale_WKM = scale_WKM * live_W.astype(jnp.float32)[:, None, None]
        old_JKM = jnp.exp(sofar.top_JKM - top_JKM)
        out_JKMH = sofar.out_JKMH * old_JKM[..., None]
        out_JKMH = out_JKMH.at[slot_W].add(part.out_JKMH * scale_WKM[..., None])
        total_JKM = (sofar.total_JKM * old_JKM).at[slot_W].add(part.total_JKM * scale_WKM)
        return first + group, PartialSoftmax(out_JKMH, top_JKM, total_JKM)

    out_JKMH = jnp.zeros((*q_JKMH.shape[:-1], size), jnp.float32)
    top_JKM = jnp.full(q_JKMH.shape[:-1], visibility.MASKED_LOGIT, jnp.float32)
    none = PartialSoftmax(out_JKMH, top_JKM, jnp.zeros_like(top_JKM))
    return jax.lax.while_loop(lambda c: c[0] < live, some, (jnp.int32(0), none))[1]


# --- pallas -----------------------------------------------------------------------------------


def _pallas_tpu(q_JKMH, cache: Cache, layer, length_J) -> PartialSoftmax:
    from copsd_jax.attention import decode_attention_tpu

    return decode_attention_tpu.attend(q_JKMH, cache, layer, length_J)


def _pallas_gpu(q_JKMH, cache: Cache, layer, length_J) -> PartialSoftmax:
    from copsd_jax.attention import decode_attention_gpu

    return decode_attention_gpu.attend(q_JKMH, cache, layer, length_J)


IMPLEMENTATIONS = {
    "dense": _dense, "blocks": _attend_live_blocks,
    "pallas_tpu": _pallas_tpu, "pallas_gpu": _pallas_gpu
}  # fmt: skip
# Maps each platform to the implementation that is used on it.
PLATFORM_IMPLEMENTATIONS = {"cpu": "blocks", "gpu": "pallas_gpu", "tpu": "pallas_tpu"}
