"""Decode attention for TPUs (Pallas, Mosaic); the kernel reads only live parts of a cache.

One query token per slot attends to the first `length` entries of its slot. The kernel visits the
live blocks slot by slot, and starts the fetches itself. Before the kernel processes a block, it
starts to fetch the live block that comes `buffers` - 1 blocks later, even if that block belongs to
a later slot. For the last block of a slot, the kernel fetches only the 128-entry chunks that
contain a live entry:

    lengths 300, 0, 40; blocks of 256     fetch        0          1          2
                                          slot         0          0          2
                                          entries   0 … 255   256 … 383   0 … 127

A dead slot costs only the time to read its length. A grid over slots and blocks would be slower
than this kernel, because each step without work costs about 0.35 us. With 256 slots of 4096
entries, 28 layers and blocks of 256, the grid steps would cost 40 ms per token. A kernel with a
prefetched list of live blocks would also be slower than this kernel, because XLA would have to
build the list in every layer.

The block size was chosen for v5e. On v5e, a block of 256 entries of 8 heads in bfloat16 takes 530
instruction words, or 0.36 us at 1.5 GHz without stalls. Of the 530 instruction words, 380 words are
for computation. The other 150 words start the fetch and find the next block; the number 150 does
not depend on the block size. Fetching a bfloat16 block of 256 entries takes 1.28 us (1 MiB at 819
GB/s). Each 128 x 128 tile of keys or values is loaded into a matrix unit once. The M queries (1 to
8) occupy 8 rows of the matrix unit, so M does not change the cost. On average, half of the
computation for a slot's last block is wasted on entries that are not live. The latency of a fetch
is about 1 us, so a block should take about 1 us to fetch. A fetch of 1 us hides the computation for
a block and the latency of the next fetch. An int8 block has to be converted before the products.
With the conversion, the computation for 384 int8 entries takes 1370 instruction words, or 0.92 us;
fetching these entries takes 0.99 us. Therefore int8 saves more memory than time.

If H is not a multiple of 128, XLA stores a cache as [..., H, A], because this layout needs no
padding. The kernel reads the layout [..., H, A] directly.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from copsd_jax.attention import decode_cache, visibility

CHUNK = decode_cache.LENGTH_MULTIPLE  # number of entries per copy
V5E = "TPU v5 lite"
# HBM bandwidth in bytes per second for each `device_kind` of jax. For a device with two cores, the
# number is the bandwidth of one core. TPU v4 has no gather across sublanes, so Mosaic cannot
# compile the kernel for TPU v4. Therefore, TPU v4 is not in this table.
BANDWIDTH = {
    V5E: 8.2e11, "TPU v5": 1.2e12, "TPU v5p": 1.2e12, "TPU v6 lite": 1.6e12, "TPU v6e": 1.6e12,
    "TPU7x": 3.7e12,
}  # fmt: skip
_TWO_CORES = ("TPU v5", "TPU v5p")  # devices with two cores
_FETCH = 1e-6  # intended time to fetch a block, in seconds
_LONGEST = 1024  # maximum number of entries in a block
_BUFFERS = 8 << 20  # maximum size of keys and values in VMEM, in bytes
_ROWS = 4 << 20  # intended maximum of VMEM for the queries and results of one program, in bytes


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of the parts into which the kernel divides its work.

    Attributes:
      keys: number of entries that are processed at once, a multiple of 128.
      buffers: number of blocks in VMEM, at least 2.
      slots: number of slots per program. Programs run one after another on each core; a v5p has two
        cores.
    """

    keys: int
    buffers: int
    slots: int


def get_attention_chip() -> str:
    """Returns the `device_kind` of the current mesh, or V5E if the mesh has no TPU."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return V5E if device is None or device.platform != "tpu" else device.device_kind


def choose_blocks(q_shape, k_shape, dtype, chip: str = V5E) -> BlockSizes:
    """Chooses block sizes: three buffers, about 1 us to fetch a block, and as many slots as fit.

    Args:
      q_shape: shape of the queries on one device, [J, K, M, H].
      k_shape: shape of the keys on one device, [layers, J, K, A, H].
      dtype: dtype of the cache.
      chip: jax's `device_kind`.

    Raises:
      ValueError: the chip is unknown.
    """
    if chip not in BANDWIDTH:
        raise ValueError(f"chip is {chip!r}: the choices are {', '.join(BANDWIDTH)}")
    (slots, heads, queries, size), length = q_shape, k_shape[3]
    entry = 2 * heads * size * jnp.dtype(dtype).itemsize
    wanted = BANDWIDTH[chip] * _FETCH / entry
    most = min(_LONGEST, length, _BUFFERS // (3 * entry))
    keys = max(CHUNK, min(round(wanted / CHUNK), most // CHUNK) * CHUNK)
    # `row` is the number of bytes that a slot takes in VMEM. The slot's arrays are double-buffered
    # and consist of float32 tiles of 8 x 128. The first term of `row` is for the queries and `out`.
    # The second term of `row` is for `top` and `total`, which have one query per lane.
    lanes = -(-size // 128) * 128
    row = 4 * 2 * (2 * heads * -(-queries // 8) * 8 * lanes + 2 * -(-heads // 8) * 8 * 128)
    two_cores = chip in _TWO_CORES and slots > 1
    programs = max(-(-slots * row // _ROWS), 1 + two_cores)
    return BlockSizes(keys, 3, -(-slots // programs))


def estimate_cost(q_shape, dtype, mean_length: float) -> pl.CostEstimate:
    """Estimates the FLOPs and bytes of one call, adding half a chunk per slot to the live entries.

    Args:
      q_shape: shape of the queries, [J, K, M, H].
      dtype: dtype of the cache; an int8 entry also has a float32 scale.
      mean_length: number of live entries per slot, averaged over all J slots.
    """
    return pl.CostEstimate(**decode_cache.count_cost(q_shape, dtype, mean_length + CHUNK / 2))


def attend(
    q_JKMH: jax.Array,
    cache: decode_cache.Cache,
    layer: jax.Array,
    length_J: jax.Array,
    *,
    blocks: BlockSizes | None = None,
    interpret: Any = False,
) -> decode_cache.PartialSoftmax:
    """Attends from each slot's queries to the slot's live entries; returns a partial softmax.

    Args:
      q_JKMH: float32 or bfloat16 queries, scaled by H**-0.5 and rotated. In VMEM, entries are
        converted to the dtype of the queries. Products use the dtype of the queries; sums and the
        softmax use float32.
      cache: the cache, whose length A must be a multiple of 128.
      layer: index of the layer, an int32 scalar.
      length_J: number of live entries in each slot, int32, 0 … A; 0 for a dead slot.
      blocks: block sizes; None means the sizes that `choose_blocks` returns for the mesh's chip.
      interpret: True or pltpu.InterpretParams to run the kernel without a TPU.

    Returns:
      The partial softmax over each slot's live entries. For a dead slot, out is 0, top is -1e30 and
      total is 0.

    Raises:
      ValueError: the cache length is not a multiple of 128, or a block size is not supported.
    """
    slots, heads, queries, size = q_JKMH.shape
    length, dtype = cache.k.shape[3], cache.k.dtype
    blocks = blocks or choose_blocks(q_JKMH.shape, cache.k.shape, dtype, get_attention_chip())
    _check_blocks(blocks, length)
    turned = size % 128 != 0
    caches = _turn(jax.tree.leaves(cache), turned)
    programs = -(-slots // blocks.slots)
    rows = pl.BlockSpec((blocks.slots, heads, queries, size), lambda i, *_: (i, 0, 0, 0))
    row = pl.BlockSpec((blocks.slots, heads, queries), lambda i, *_: (i, 0, 0))
    entry = (size, blocks.keys) if turned else (blocks.keys, size)
    shapes = [(blocks.buffers, heads, *entry)] * 2 + [(blocks.buffers, heads, blocks.keys)] * 2
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    parts = pl.pallas_call(
        functools.partial(_attend_slots_kernel, blocks, turned, len(caches)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(programs,),
            in_specs=[rows, *[pl.BlockSpec(memory_space=pl.ANY)] * len(caches)],
            out_specs=[rows, row, row],
            scratch_shapes=[
                *(pltpu.VMEM(s, c.dtype) for s, c in zip(shapes, caches, strict=False)),
                pltpu.SemaphoreType.DMA((blocks.buffers,)), pltpu.SMEM((2,), jnp.int32),
            ],
        ),
        out_shape=[float32(q_JKMH.shape), float32(q_JKMH.shape[:3]), float32(q_JKMH.shape[:3])],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=estimate_cost(q_JKMH.shape, dtype, length / 2),
        interpret=interpret,
        name="decode_attention",
    )(
        # Slots that pad the last program get length 0, which makes them dead.
        layer.reshape(1), jnp.pad(length_J, (0, programs * blocks.slots - slots)), q_JKMH, *caches
    )  # fmt: skip
    return decode_cache.PartialSoftmax(*parts)


def _turn(caches: Sequence[jax.Array], turned: bool) -> list[jax.Array]:
    """Transposes A and H of keys and values; memory already has the order [..., H, A]."""
    return [x.swapaxes(3, 4) if turned and x.ndim == 5 else x for x in caches]


def _check_blocks(blocks: BlockSizes, length: int) -> None:
    decode_cache.check_length(length)
    if blocks.keys % CHUNK or not 0 < blocks.keys <= length:
        raise ValueError(
            f"blocks.keys is {blocks.keys}: it must be a multiple of {CHUNK} up to {length}"
        )
    if blocks.buffers < 2:
        raise ValueError(f"blocks.buffers is {blocks.buffers}: it must be at least 2")


class _Copies(NamedTuple):
    """The transfers from caches to a program's buffers; `first` is the program's first slot."""

    keys: int
    turned: bool
    layer: jax.Array
    first: jax.Array
    length_J: Any
    caches: Sequence[Any]
    buffers: Sequence[Any]
    sem: Any

    def run(self, act: Callable[[Any], None], slot, block, at) -> None:
        """Calls `act` (start or wait) on each transfer of a block's live chunks to buffer `at`."""
        for chunk in range(self.keys // CHUNK):
            start = block * self.keys + chunk * CHUNK

            @pl.when(start < self.length_J[self.first + slot])
            def _(start=start, chunk=chunk):
                entries = pl.ds(pl.multiple_of(start, CHUNK), CHUNK)
                into = pl.ds(chunk * CHUNK, CHUNK)
                for i, (cache, buffer) in enumerate(zip(self.caches, self.buffers, strict=True)):
                    # K comes first, then H if `_turn` transposed the array, then the entries.
                    axis = (slice(None),) * (2 if self.turned and i < 2 else 1)
                    from_ = cache.at[(self.layer, self.first + slot, *axis, entries)]
                    to = buffer.at[(at, *axis, into)]
                    act(pltpu.make_async_copy(from_, to, self.sem.at[at]))


def _attend_slots_kernel(blocks: BlockSizes, turned: bool, n: int, layer_1, length_J, q_ref, *refs):
    """Computes a program's slots one by one; the `n` caches are keys, values, and any scales."""
    caches, (out_ref, top_ref, total_ref), buffers, (sem, ahead) = (
        refs[:n], refs[n : n + 3], refs[n + 3 : 2 * n + 3], refs[2 * n + 3 :],
    )  # fmt: skip
    group, keys, depth = blocks.slots, blocks.keys, blocks.buffers
    first = pl.program_id(0) * group
    copies = _Copies(keys, turned, layer_1[0], first, length_J, caches, buffers, sem)

    def live(slot):
        """Returns the first live slot at or after `slot`, or `group` if there is none."""
        dead = lambda s: (s < group) & (length_J[first + jnp.minimum(s, group - 1)] == 0)  # noqa: E731
        return jax.lax.while_loop(dead, lambda s: s + 1, slot)

    def fetch(number):
        """Starts to fetch the next live block, if there is another live block."""
        slot, block = ahead[0], ahead[1]

        @pl.when(slot < group)
        def _():
            copies.run(lambda copy: copy.start(), slot, block, jax.lax.rem(number, depth))
            more = (block + 1) * keys < length_J[first + slot]
            ahead[1] = jnp.where(more, block + 1, 0)

            @pl.when(jnp.logical_not(more))
            def _():
                ahead[0] = live(slot + 1)

    def add(part, slot, block, number, left):
        """Fetches ahead, waits for a block, and adds it to the slot's partial softmax."""
        fetch(number + depth - 1)
        at = jax.lax.rem(number, depth)
        copies.run(lambda copy: copy.wait(), slot, block, at)
        return _attend_block_tpu(
            part, q_ref[slot], [buffer[at] for buffer in buffers], turned, left
        )

    def one(slot, number):
        length = length_J[first + slot]
        full = jax.lax.div(jnp.maximum(length - 1, 0), keys)  # number of blocks without a mask
        none = jnp.full((*q_ref.shape[1:3], 1), visibility.MASKED_LOGIT, jnp.float32)
        part = jnp.zeros(q_ref.shape[1:], jnp.float32), none, jnp.zeros_like(none)
        part = jax.lax.fori_loop(
            0, full, lambda block, part: add(part, slot, block, number + block, None), part
        )

        def store(part):
            out_ref[slot] = part[0]
            top_ref[slot], total_ref[slot] = part[1][..., 0], part[2][..., 0]

        last = lambda: add(part, slot, full, number + full, length - full * keys)  # noqa: E731
        pl.when(length > 0)(lambda: store(last()))
        pl.when(length == 0)(lambda: store(part))
        return number + full + (length > 0).astype(jnp.int32)

    ahead[0], ahead[1] = live(jnp.int32(0)), jnp.int32(0)
    for number in range(depth - 1):
        fetch(jnp.int32(number))
    jax.lax.fori_loop(0, group, one, jnp.int32(0))


def _attend_block_tpu(part, q_KMH, block, turned: bool, left):
    """Adds the first `left` entries of a block to a partial softmax; None means all entries."""
    (out_KMH, top_KM1, total_KM1), (k, v, *scales) = part, block
    dtype, entries = q_KMH.dtype, 2 if turned else 1
    logit_KMS = decode_cache.multiply(q_KMH, k.astype(dtype), 3 - entries)
    if scales:
        logit_KMS = logit_KMS * scales[0][:, None, :]
    seen = None
    if left is not None:
        seen = jax.lax.broadcasted_iota(jnp.int32, logit_KMS.shape, 2) < left
        logit_KMS = jnp.where(seen, logit_KMS, visibility.MASKED_LOGIT)
        # Entries at index `left` and at higher indices are garbage. The values of these entries are
        # set to 0. A weight of 0 would not be enough, because 0 times NaN is NaN.
        index = jax.lax.broadcasted_iota(jnp.int32, v.shape, entries)
        v = jnp.where(index < left, v, jnp.zeros_like(v))
    new_KM1 = jnp.maximum(top_KM1, jnp.max(logit_KMS, axis=-1, keepdims=True))
    shrink_KM1 = jnp.exp(top_KM1 - new_KM1)
    weight_KMS = jnp.exp(logit_KMS - new_KM1)
    total_KM1 = total_KM1 * shrink_KM1 + jnp.sum(weight_KMS, axis=-1, keepdims=True)
    if scales:
        weight_KMS = weight_KMS * scales[1][:, None, :]
        if seen is not None:
            weight_KMS = jnp.where(seen, weight_KMS, 0.0)
    new_KMH = decode_cache.multiply(weight_KMS.astype(dtype), v.astype(dtype), entries)
    return out_KMH * shrink_KM1 + new_KMH, new_KM1, total_KM1


def write_cache_entries(
    caches: Sequence[jax.Array],
    entries: Sequence[jax.Array],
    layer: jax.Array,
    index_J: jax.Array,
    interpret: Any = False,
) -> list[jax.Array]:
    """Writes one entry per slot into a layer of caches [layers, J, K, A, H] or [layers, J, K, A].

    Caches that are donated or carried by a loop are updated in place. XLA's scatter would move one
    row after another, and would copy the cache if XLA prefers another layout. For each slot, this
    kernel reads the tile that contains the entry, changes the tile, and writes the tile back. Slots
    are processed in a pipeline.

    Args:
      caches: keys and values, and the float32 scales of an int8 cache; A must be a multiple of 128.
      entries: the new entries of each cache, [J, K, H] or [J, K], in the cache's dtype.
      layer: index of the layer, an int32 scalar.
      index_J: index of the entry in each slot, int32; a slot with an index outside 0 … A - 1 is
        left unchanged.
      interpret: True or pltpu.InterpretParams to run the kernel without a TPU.

    Returns:
      The updated caches.
    """
    turned = entries[0].shape[2] % 128 != 0
    tiles = [_find_tile(x, turned) for x in caches]
    caches = _turn(caches, turned)
    # New entries get an axis of length 1 where the cache has its axis over entries.
    entries = [jnp.expand_dims(x, axis - 1) for x, (axis, _) in zip(entries, tiles, strict=True)]
    length = caches[0].shape[tiles[0][0]]

    def spec(x, axis, size):
        def at(j, layer, index_J):
            tile = jax.lax.div(jnp.clip(index_J[j], 0, length - 1), size)
            return layer[0], j, *(tile if i == axis else 0 for i in range(2, x.ndim))

        shape = (size if i == axis else n for i, n in enumerate((1, 1, *x.shape[2:])))
        return pl.BlockSpec(tuple(shape), at)

    places = [spec(x, *tile) for x, tile in zip(caches, tiles, strict=True)]
    new = [
        pl.BlockSpec((1, *x.shape[1:]), lambda j, *_, n=x.ndim: (j,) + (0,) * (n - 1))
        for x in entries
    ]
    caches = pl.pallas_call(
        functools.partial(_write_cache_kernel, tiles, length),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=index_J.shape, in_specs=[*new, *places], out_specs=places
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches],
        input_output_aliases={2 + len(new) + i: i for i in range(len(caches))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="cache_write",
    )(layer.reshape(1), index_J, *entries, *caches)  # fmt: skip
    return _turn(caches, turned)


def _find_tile(cache: jax.Array, turned: bool) -> tuple[int, int]:
    """Returns the index of the entry axis in memory, and the number of entries per tile."""
    if cache.ndim == 4:
        return 3, 128
    return (4, 128) if turned else (3, 32 // cache.dtype.itemsize)


def _write_cache_kernel(tiles, length: int, layer_1, index_J, *refs):
    """Writes one slot's new entry into each cache by replacing the tile that contains the entry."""
    del layer_1  # Only the index maps of the grid use layer_1.
    index, n = index_J[pl.program_id(0)], len(tiles)
    for (axis, size), new, old, out in zip(
        tiles, refs[:n], refs[n : 2 * n], refs[2 * n :], strict=True
    ):
        value = old[0, 0]
        # A TPU v5e has no select instruction for numbers of 8 or 16 bits.
        wide = jnp.int32 if value.dtype == jnp.int8 else jnp.float32
        place = jax.lax.broadcasted_iota(jnp.int32, value.shape, axis - 2)
        here = (place == jax.lax.rem(index, size)) & (index >= 0) & (index < length)
        out[0, 0] = jnp.where(here, new[0].astype(wide), value.astype(wide)).astype(value.dtype)
