"""Block sizes of the divergence kernels: a rule by shape and chip, and a table of measured ones.

`benchmarks/tune_loss.py` times candidates on the chip at hand and writes the table; where it has
the shape, the rule reads it. A block's memory is what bounds it:

  TPU: VMEM holds the hidden states of both sides (pass 1) or the float32 gradient (pass 3) of a
    block of tokens, HBM what is kept of its entries; each pass reads the head once per block, so
    the more tokens the better.
  GPU: HBM holds both sides' float32 logits and the bfloat16 dz of a block, 10 bytes an entry.
"""

import dataclasses
import functools
import json
import pathlib

import jax.numpy as jnp
from jax.experimental import pallas as pl

from copsd_jax.losses import divergences
from copsd_jax.losses.pallas import row_statistics as rows_lib
from copsd_jax.runtime import hardware

TABLE = pathlib.Path(__file__).with_name("tuned.json")
MIB = 2**20
LANES = 128  # of a TPU's registers: token counts and tile widths are multiples


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a sweep.

    Attributes:
      tokens: of a block, whose temporaries exist once whatever the number of tokens; TPU: a
        multiple of `rows`.
      vocab: width of a vocabulary tile; TPU: a multiple of 128, GPU: a power of two.
      rows: of a block that one program works on; TPU: a multiple of 128, GPU: unused.
      warps: of a GPU program; TPU: unused.
    """

    tokens: int
    vocab: int
    rows: int = 256
    warps: int = 8


SMALLEST = hardware.Chip(0, 0, 8e9, 16 * MIB)  # in each respect (TPU v2): for one that is unknown
SPARE_VMEM = 14 * MIB  # at most: registers that spill, and what the compiler adds
KEPT = 1 / 8  # of a TPU's memory, for what is kept of a block's entries
GPU_BYTES = 0.8e9  # of a block's logits and dz


def tpu(
    kind: str, width: int, vocabulary: int, dtype: jnp.dtype, *, tied: bool, train_head: bool
) -> Blocks:
    """The sizes for one shard.

    Args:
      kind: `device_kind` of the mesh's devices; an unknown one gets the smallest VMEM's.
      width: D.
      vocabulary: rows of the shard's head.
      tied: whether both sides have one head.

    Raises:
      ValueError: a width of which not even the smallest tiles fit.
    """
    found = tuned(kind, width, vocabulary, dtype, tied=tied, train_head=train_head)
    if found:
        return found
    chip = hardware.CHIPS.get(kind, SMALLEST)
    budget = chip.vmem - spare(chip.vmem)
    most = KEPT * chip.memory / (vocabulary * kept_bytes(dtype))
    for tile in (1024, 512, 256, 128):  # the smallest, if nothing fits, comes last
        for tokens in (4096, 2048, 1536, 1024, 512, 256, 128):
            sizes = Blocks(tokens, tile, min(256, tokens))
            need = vmem(sizes, width, dtype, tied=tied, train_head=train_head)
            # Tiles may shrink, but not below what the matrix unit needs, before tokens do; with
            # few tokens a block waits for the head, so the narrowest tiles come before those.
            enough = {1024: 1024, 512: 1024, 256: 256, 128: 128}[tile]
            if need <= budget and enough <= tokens <= most:
                return sizes
    raise ValueError(
        f"the width is {width}: no block of 128 tokens and 128 entries fits into {budget} bytes "
        f"of the VMEM of {kind or 'the smallest TPU'}; use loss.implementation=chunked"
    )


def spare(vmem: int) -> int:
    """Bytes of a chip's VMEM that no block is planned into."""
    return min(SPARE_VMEM, vmem // 4)


def vmem_limit(need: int) -> int:
    """What a kernel that needs so many bytes of VMEM may take, on every chip whose rule allows it.

    All of the smallest chip's, or more than that: chips that such a block fits have the room.
    """
    least = SMALLEST.vmem
    return least if need <= least - spare(least) else need + SPARE_VMEM


def vmem(sizes: Blocks, width: int, dtype: jnp.dtype, *, tied: bool, train_head: bool) -> int:
    """Bytes of VMEM that the hungriest pass holds; windows that move are held twice."""
    item = jnp.dtype(dtype).itemsize
    tile, block = sizes.vocab * width, sizes.tokens * width
    entries = sizes.rows * sizes.vocab
    stored = 2 * entries * kept_bytes(dtype)
    first = 2 * block * item + 2 * tile * item * (1 if tied else 2) + 2 * entries * 4 + stored
    third = block * 4 + 2 * tile * item + stored + entries * item
    third += sizes.rows * width * 4  # of the product before it is added
    if train_head:
        third += block * item + 5 * tile * 4
    return max(first, third)


def gpu(
    kind: str,
    width: int,
    vocabulary: int,
    dtype: jnp.dtype,
    *,
    tied: bool = True,
    train_head: bool = False,
) -> Blocks:
    """As `tpu`: the longest block of whole 128 tokens in GPU_BYTES, at least 256."""
    found = tuned(kind, width, vocabulary, dtype, tied=tied, train_head=train_head)
    if found:
        return found
    tokens = int(GPU_BYTES / (vocabulary * entry_bytes("gpu", dtype))) // LANES * LANES
    return Blocks(min(max(tokens, 256), 4096), 4096)


def kept_bytes(dtype: jnp.dtype) -> int:
    """What a TPU keeps of an entry: two float32, or both rounded into 32 bits."""
    return 8 if jnp.dtype(dtype) == jnp.float32 else 4


def entry_bytes(platform: str, dtype: jnp.dtype) -> int:
    """Temporary memory of a block for each of its entries; a GPU holds logits and dz."""
    return kept_bytes(dtype) if platform == "tpu" else 8 + jnp.dtype(dtype).itemsize


def fit(sizes: Blocks, tokens: int) -> Blocks:
    """TPU sizes with blocks evenly filled, and no longer than the tokens need."""
    unit = min(sizes.rows, even(tokens, tokens, LANES))
    return dataclasses.replace(sizes, rows=unit, tokens=even(tokens, sizes.tokens, unit))


def even(tokens: int, most: int, unit: int) -> int:
    """Rows of a block: as few blocks as `most` allows, evenly filled, in whole units.

    5000 tokens, most 4096, unit 256 -> 2 blocks of 2560.
    """
    blocks = max(1, -(-tokens // most))
    return -(-max(tokens, 1) // (blocks * unit)) * unit


def key(
    kind: str, width: int, vocabulary: int, dtype: jnp.dtype, *, tied: bool, train_head: bool
) -> str:
    """Of an entry of the table: the width as the kernels get it, so a TPU's in whole lanes."""
    heads = "one head" if tied else "two heads"
    grads = "head's gradient" if train_head else "states' gradient"
    return f"{kind}, D {width}, V {vocabulary}, {jnp.dtype(dtype).name}, {heads}, {grads}"


def tuned(
    kind: str, width: int, vocabulary: int, dtype: jnp.dtype, *, tied: bool, train_head: bool
) -> Blocks | None:
    """The table's entry, None where it has none."""
    name = key(kind, width, vocabulary, dtype, tied=tied, train_head=train_head)
    entry = _table(TABLE).get(name)
    return Blocks(**entry) if entry else None


@functools.cache
def _table(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# --- cost --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of matmuls, bytes between HBM and VMEM, and exponentials or logarithms."""

    flops: int
    bytes: int
    transcendentals: int

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))

    def estimate(self) -> pl.CostEstimate:
        return pl.CostEstimate(
            flops=self.flops,
            bytes_accessed=self.bytes,
            transcendentals=self.transcendentals,
        )


def tpu_cost(
    settings: divergences.Divergence,
    blocks: Blocks,
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: jnp.dtype,
    *,
    tied: bool = True,
    train_head: bool = False,
) -> Cost:
    """Of a sweep on one device: what every grid step moves that the step before did not hold."""
    blocks = fit(blocks, tokens)
    fused = rows_lib.fused(settings, train_head)
    block = logits_cost(blocks, width, vocabulary, dtype, 1 if tied else 2)
    block += gradient_cost(blocks, width, vocabulary, dtype, fused, train_head)
    if rows_lib.two_passes(settings, train_head):
        block += sums_cost(blocks, vocabulary, kept_bytes(dtype))
    times = -(-tokens // blocks.tokens)
    return Cost(*(times * x for x in dataclasses.astuple(block)))


def _entries(blocks: Blocks, size: int) -> tuple[int, int]:
    """Entries of a block with those of a cut tile, and bytes of 8 numbers a row and tile."""
    tiles = -(-size // blocks.vocab)
    return tiles * blocks.vocab * blocks.tokens, tiles * rows_lib.ROW_STATS * blocks.tokens * 4


def logits_cost(blocks: Blocks, width: int, size: int, dtype: jnp.dtype, heads: int) -> Cost:
    entries, numbers = _entries(blocks, size)
    item = jnp.dtype(dtype).itemsize
    moved = 2 * blocks.tokens * width * item + heads * _head(blocks, width, size) * item
    moved += entries * kept_bytes(dtype) + numbers
    return Cost(4 * entries * width, moved, 3 * entries)


def sums_cost(blocks: Blocks, size: int, entry: int) -> Cost:
    entries, numbers = _entries(blocks, size)
    return Cost(0, entries * entry + 2 * numbers, 2 * entries)


def gradient_cost(
    blocks: Blocks, width: int, size: int, dtype: jnp.dtype, fused: bool, train_head: bool
) -> Cost:
    entries, numbers = _entries(blocks, size)
    item, head = jnp.dtype(dtype).itemsize, _head(blocks, width, size)
    moved = entries * kept_bytes(dtype) + (1 + fused) * numbers + head * item
    moved += blocks.tokens * width * 4
    if train_head:
        moved += blocks.tokens * width * item + 2 * head * 4
    return Cost((4 if train_head else 2) * entries * width, moved, 2 * entries)


def _head(blocks: Blocks, width: int, size: int) -> int:
    """Numbers in all tiles of the head; the part of the last one past the end counts too."""
    return -(-size // blocks.vocab) * blocks.vocab * width
