"""Chooses block sizes of the divergence kernels, and estimates the cost of each pass on a TPU.

Memory limits the number of tokens in a block:

- On a TPU, VMEM must hold the hidden states of both sides (pass 1) or the float32 gradient
  (pass 3). HBM must hold the stored entries. Larger blocks are better, because passes 1 and 3 each
  read the head once per block.
- On a GPU, HBM must hold the float32 logits of both sides and the bfloat16 dz: 10 bytes per entry
  in total.

`benchmarks/tune_loss.py` measures other sizes on the chip at hand.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from copsd_jax.losses.pallas import row_statistics
from copsd_jax.runtime import hardware

MIB = 2**20
LANES = 128  # lanes per TPU register; token counts and tile widths are multiples of 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks and tiles of a sweep.

    Attributes:
      tokens: number of tokens per block. Temporary arrays have `tokens` rows, no matter how many
        tokens a sweep has. On a TPU, `tokens` is a multiple of `rows`.
      vocab: width of a vocabulary tile; a multiple of 128 on a TPU, and a power of two on a GPU.
      rows: number of rows that one grid step works on; a multiple of 128 on a TPU, and unused on a
        GPU.
      warps: number of warps per GPU program; unused on a TPU.
    """

    tokens: int
    vocab: int
    rows: int = 256
    warps: int = 8


SMALLEST = hardware.Chip(0, 0, 8e9, 16 * MIB)  # smallest memory and VMEM of any chip (TPU v2)
SPARE_VMEM = 14 * MIB  # maximum number of bytes left free for spilled registers and the compiler
STORED_SHARE = 1 / 8  # share of a TPU's memory that a block's stored entries may take
GPU_BYTES = 0.8e9  # number of bytes that a block's logits and dz may take


def choose_tpu(
    kind: str, width: int, vocabulary: int, dtype: jnp.dtype, *, tied: bool, train_head: bool
) -> Blocks:
    """Chooses the block sizes for one shard on a TPU.

    Args:
      kind: `device_kind` of the mesh's devices; an unknown kind gets the smallest chip's sizes.
      width: D, the width of the hidden states.
      vocabulary: number of rows in the shard's head.
      dtype: dtype of the hidden states.
      tied: whether both sides share a head.
      train_head: whether the head's gradient is computed.

    Raises:
      ValueError: not even the smallest tiles fit at this width.
    """
    chip = hardware.CHIPS.get(kind, SMALLEST)
    budget = chip.vmem - _compute_spare_loss_vmem(chip.vmem)
    most = STORED_SHARE * chip.memory / (vocabulary * kept_bytes(dtype))
    for tile in (1024, 512, 256, 128):
        for tokens in (4096, 2048, 1536, 1024, 512, 256, 128):
            sizes = Blocks(tokens, tile, min(256, tokens))
            need = count_loss_vmem(sizes, width, dtype, tied=tied, train_head=train_head)
            # Before the block shrinks below 1,024 tokens, the tile shrinks to the width that the
            # matrix unit needs. In a block with few tokens, the matrix unit would wait for the head
            # to load.
            enough = {1024: 1024, 512: 1024, 256: 256, 128: 128}[tile]
            if need <= budget and enough <= tokens <= most:
                return sizes
    raise ValueError(
        f"the width is {width}: no block of 128 tokens and 128 entries fits into {budget} bytes "
        f"of VMEM on {kind or 'the smallest TPU'}; use loss.implementation=chunked"
    )


def _compute_spare_loss_vmem(vmem: int) -> int:
    """Returns how many bytes of a chip's VMEM the blocks must leave free."""
    return min(SPARE_VMEM, vmem // 4)


def compute_loss_vmem_limit(need: int) -> int:
    """Returns the VMEM limit, in bytes, for compiling a kernel that needs `need` bytes.

    The limit is valid on every chip for which `choose_tpu` returns a block that needs `need` bytes.
    The limit is at least the VMEM of the smallest chip. A block that does not fit on the smallest
    chip fits only on chips with at least `need` + SPARE_VMEM bytes of VMEM.
    """
    least = SMALLEST.vmem
    return least if need <= least - _compute_spare_loss_vmem(least) else need + SPARE_VMEM


def count_loss_vmem(
    sizes: Blocks, width: int, dtype: jnp.dtype, *, tied: bool, train_head: bool
) -> int:
    """Returns how many bytes of VMEM the most demanding pass needs.

    Tiles that move with the grid have two buffers, so that the next tile can load while the current
    tile is used.
    """
    item = jnp.dtype(dtype).itemsize
    tile, block = sizes.vocab * width, sizes.tokens * width
    entries = sizes.rows * sizes.vocab
    stored = 2 * entries * kept_bytes(dtype)
    first = 2 * block * item + 2 * tile * item * (1 if tied else 2) + 2 * entries * 4 + stored
    third = block * 4 + 2 * tile * item + stored + entries * item
    third += sizes.rows * width * 4  # the product of dz and a tile of the head
    if train_head:
        third += block * item + 5 * tile * 4
    return max(first, third)


def choose_gpu(
    kind: str, width: int, vocabulary: int, dtype: jnp.dtype, *, tied: bool = True,
    train_head: bool = False,
) -> Blocks:  # fmt: skip
    """Chooses the block sizes for one shard on a GPU: as many tokens as GPU_BYTES allows.

    A block has 256 to 4,096 tokens, in multiples of 128. The arguments are those of `choose_tpu`;
    only `vocabulary` and `dtype` are used.
    """
    del kind, width, tied, train_head
    tokens = int(GPU_BYTES / (vocabulary * entry_bytes("gpu", dtype))) // LANES * LANES
    return Blocks(min(max(tokens, 256), 4096), 4096)


def kept_bytes(dtype: jnp.dtype) -> int:
    """Returns how many bytes an entry's two stored numbers take on a TPU: 8 in float32, else 4."""
    return 8 if jnp.dtype(dtype) == jnp.float32 else 4


def entry_bytes(platform: str, dtype: jnp.dtype) -> int:
    """Returns how many bytes of memory a block needs per entry; a GPU stores logits and dz."""
    return kept_bytes(dtype) if platform == "tpu" else 8 + jnp.dtype(dtype).itemsize


def fit(sizes: Blocks, tokens: int) -> Blocks:
    """Fits TPU block sizes to the number of tokens, so that all blocks are about equally full."""
    unit = min(sizes.rows, divide_rows_evenly(tokens, tokens, LANES))
    return dataclasses.replace(
        sizes, rows=unit, tokens=divide_rows_evenly(tokens, sizes.tokens, unit)
    )


def divide_rows_evenly(tokens: int, most: int, unit: int) -> int:
    """Divides tokens into the fewest blocks of at most `most` rows; returns the rows per block.

    The number of rows per block is a multiple of `unit`. For example, 5000 tokens with `most` 4096
    and `unit` 256 give 2 blocks of 2560 rows.
    """
    blocks = max(1, -(-tokens // most))
    return -(-max(tokens, 1) // (blocks * unit)) * unit


# --- cost of the TPU's passes ---------------------------------------------------------------------
# The cost of a grid step includes all bytes that the step moves, except bytes that the previous
# step already loaded. Partial tiles count as whole tiles.


def estimate_logits_cost(
    blocks: Blocks, width: int, vocabulary: int, dtype: jnp.dtype, heads: int
) -> pl.CostEstimate:
    """Estimates the cost of pass 1 for a block; `heads` is 1 if both sides share a head."""
    entries, numbers = _count_entries(blocks, vocabulary)
    item = jnp.dtype(dtype).itemsize
    moved = 2 * blocks.tokens * width * item
    moved += heads * _count_head(blocks, width, vocabulary) * item
    moved += entries * kept_bytes(dtype) + numbers
    flops = 4 * entries * width
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=3 * entries)


def estimate_sums_cost(blocks: Blocks, vocabulary: int, entry: int) -> pl.CostEstimate:
    """Estimates the cost of pass 2 for a block; `entry` is the number of bytes stored per entry."""
    entries, numbers = _count_entries(blocks, vocabulary)
    moved = entries * entry + 2 * numbers
    return pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=2 * entries)


def estimate_gradient_cost(
    blocks: Blocks, width: int, vocabulary: int, dtype: jnp.dtype, fused: bool, train_head: bool
) -> pl.CostEstimate:
    """Estimates the cost of pass 3 for a block; if `fused`, pass 3 also writes Σe."""
    entries, numbers = _count_entries(blocks, vocabulary)
    item, head = jnp.dtype(dtype).itemsize, _count_head(blocks, width, vocabulary)
    moved = entries * kept_bytes(dtype) + (1 + fused) * numbers + head * item
    moved += blocks.tokens * width * 4
    if train_head:
        moved += blocks.tokens * width * item + 2 * head * 4
    flops = (4 if train_head else 2) * entries * width
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=2 * entries)


def _count_entries(blocks: Blocks, vocabulary: int) -> tuple[int, int]:
    """Returns how many entries a block has, and how many bytes the block's statistics take."""
    tiles = -(-vocabulary // blocks.vocab)
    numbers = tiles * row_statistics.ROW_STATS * blocks.tokens * 4
    return tiles * blocks.vocab * blocks.tokens, numbers


def _count_head(blocks: Blocks, width: int, vocabulary: int) -> int:
    """Returns how many numbers all tiles of the head contain, padding included."""
    return -(-vocabulary // blocks.vocab) * blocks.vocab * width
