"""Block sizes of the divergence kernels by shape and chip, and the cost of the TPU's passes.

Memory bounds a block:

  TPU: VMEM holds the hidden states of both sides (pass 1) or the float32 gradient (pass 3) of a
    block of tokens, and HBM the stored entries. Each pass reads the head once per block, so more
    tokens are better.
  GPU: HBM holds both sides' float32 logits and the bfloat16 dz of a block, 10 bytes an entry.

`benchmarks/tune_loss.py` times other sizes on the chip at hand.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from copsd_jax.losses.pallas import row_statistics
from copsd_jax.runtime import hardware

MIB = 2**20
LANES = 128  # lanes of a TPU's registers: token counts and tile widths are multiples


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a sweep.

    Attributes:
      tokens: tokens of a block. Its temporaries exist once for any number of tokens. TPU: a
        multiple of `rows`.
      vocab: width of a vocabulary tile; TPU: a multiple of 128, GPU: a power of two.
      rows: rows of a block that one grid step works on; TPU: a multiple of 128, GPU: unused.
      warps: warps of a GPU program; TPU: unused.
    """

    tokens: int
    vocab: int
    rows: int = 256
    warps: int = 8


SMALLEST = hardware.Chip(0, 0, 8e9, 16 * MIB)  # least memory and VMEM of all chips (TPU v2)
SPARE_VMEM = 14 * MIB  # bytes left, at most, for spilled registers and the compiler's own buffers
STORED_SHARE = 1 / 8  # share of a TPU's memory for the stored entries of a block
GPU_BYTES = 0.8e9  # bytes of a block's logits and dz


def choose_tpu(
    kind: str, width: int, vocabulary: int, dtype: jnp.dtype, *, tied: bool, train_head: bool
) -> Blocks:
    """Chooses the sizes for one shard on a TPU.

    Args:
      kind: `device_kind` of the mesh's devices; an unknown one gets the smallest chip's sizes.
      width: D.
      vocabulary: rows of the shard's head.
      dtype: of the hidden states.
      tied: whether both sides have one head.
      train_head: whether the head's gradient is taken.

    Raises:
      ValueError: a width at which not even the smallest tiles fit.
    """
    chip = hardware.CHIPS.get(kind, SMALLEST)
    budget = chip.vmem - spare_vmem(chip.vmem)
    most = STORED_SHARE * chip.memory / (vocabulary * kept_bytes(dtype))
    for tile in (1024, 512, 256, 128):
        for tokens in (4096, 2048, 1536, 1024, 512, 256, 128):
            sizes = Blocks(tokens, tile, min(256, tokens))
            need = vmem_bytes(sizes, width, dtype, tied=tied, train_head=train_head)
            # Shrink tiles before tokens, down to the width that the matrix unit needs: with few
            # tokens a block waits for the head.
            enough = {1024: 1024, 512: 1024, 256: 256, 128: 128}[tile]
            if need <= budget and enough <= tokens <= most:
                return sizes
    raise ValueError(
        f"the width is {width}: no block of 128 tokens and 128 entries fits into {budget} bytes "
        f"of the VMEM of {kind or 'the smallest TPU'}; use loss.implementation=chunked"
    )


def spare_vmem(vmem: int) -> int:
    """Returns the bytes of a chip's VMEM that stay free of blocks."""
    return min(SPARE_VMEM, vmem // 4)


def vmem_limit(need: int) -> int:
    """Returns the limit in bytes to compile a kernel with that needs so many bytes of VMEM.

    The limit holds on every chip for which `choose_tpu` returns such a block. It is at least the
    smallest chip's VMEM; a block that needs more only fits chips that have the spare room as well.
    """
    least = SMALLEST.vmem
    return least if need <= least - spare_vmem(least) else need + SPARE_VMEM


def vmem_bytes(sizes: Blocks, width: int, dtype: jnp.dtype, *, tied: bool, train_head: bool) -> int:
    """Returns the bytes of VMEM of the pass that needs most.

    Tiles that move with the grid are held twice, so that the next one loads during the work.
    """
    item = jnp.dtype(dtype).itemsize
    tile, block = sizes.vocab * width, sizes.tokens * width
    entries = sizes.rows * sizes.vocab
    stored = 2 * entries * kept_bytes(dtype)
    first = 2 * block * item + 2 * tile * item * (1 if tied else 2) + 2 * entries * 4 + stored
    third = block * 4 + 2 * tile * item + stored + entries * item
    third += sizes.rows * width * 4  # the product, before it is added
    if train_head:
        third += block * item + 5 * tile * 4
    return max(first, third)


def choose_gpu(
    kind: str, width: int, vocabulary: int, dtype: jnp.dtype, *, tied: bool = True,
    train_head: bool = False,
) -> Blocks:  # fmt: skip
    """Chooses the sizes for one shard on a GPU: the most whole 128 tokens in GPU_BYTES.

    A block has 256 to 4,096 tokens. The arguments are those of `choose_tpu`; only the vocabulary
    and the dtype matter.
    """
    del kind, width, tied, train_head
    tokens = int(GPU_BYTES / (vocabulary * entry_bytes("gpu", dtype))) // LANES * LANES
    return Blocks(min(max(tokens, 256), 4096), 4096)


def kept_bytes(dtype: jnp.dtype) -> int:
    """Returns the bytes that a TPU stores of an entry: two float32, or both in 32 bits."""
    return 8 if jnp.dtype(dtype) == jnp.float32 else 4


def entry_bytes(platform: str, dtype: jnp.dtype) -> int:
    """Returns the bytes of temporary memory for each entry of a block; a GPU has logits and dz."""
    return kept_bytes(dtype) if platform == "tpu" else 8 + jnp.dtype(dtype).itemsize


def fit(sizes: Blocks, tokens: int) -> Blocks:
    """Fits TPU sizes to the tokens: blocks are evenly filled and not longer than needed."""
    unit = min(sizes.rows, even_rows(tokens, tokens, LANES))
    return dataclasses.replace(sizes, rows=unit, tokens=even_rows(tokens, sizes.tokens, unit))


def even_rows(tokens: int, most: int, unit: int) -> int:
    """Returns the rows of a block, in whole units, for as few blocks as `most` allows.

    5000 tokens, most 4096, unit 256 -> 2 blocks of 2560.
    """
    blocks = max(1, -(-tokens // most))
    return -(-max(tokens, 1) // (blocks * unit)) * unit


# --- cost of the TPU's passes ---------------------------------------------------------------------
# Every grid step counts the bytes that it moves and the step before did not hold. Cut tiles count
# whole.


def estimate_logits_cost(
    blocks: Blocks, width: int, vocabulary: int, dtype: jnp.dtype, heads: int
) -> pl.CostEstimate:
    """Estimates pass 1 over a block of tokens; `heads` is 1 where both sides share one."""
    entries, numbers = _count_entries(blocks, vocabulary)
    item = jnp.dtype(dtype).itemsize
    moved = 2 * blocks.tokens * width * item
    moved += heads * _count_head(blocks, width, vocabulary) * item
    moved += entries * kept_bytes(dtype) + numbers
    flops = 4 * entries * width
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=3 * entries)


def estimate_sums_cost(blocks: Blocks, vocabulary: int, entry: int) -> pl.CostEstimate:
    """Estimates pass 2 over a block of tokens, with `entry` stored bytes of each entry."""
    entries, numbers = _count_entries(blocks, vocabulary)
    moved = entries * entry + 2 * numbers
    return pl.CostEstimate(flops=0, bytes_accessed=moved, transcendentals=2 * entries)


def estimate_gradient_cost(
    blocks: Blocks, width: int, vocabulary: int, dtype: jnp.dtype, fused: bool, train_head: bool
) -> pl.CostEstimate:
    """Estimates pass 3 over a block of tokens; `fused` if it writes the sums of pass 2 as well."""
    entries, numbers = _count_entries(blocks, vocabulary)
    item, head = jnp.dtype(dtype).itemsize, _count_head(blocks, width, vocabulary)
    moved = entries * kept_bytes(dtype) + (1 + fused) * numbers + head * item
    moved += blocks.tokens * width * 4
    if train_head:
        moved += blocks.tokens * width * item + 2 * head * 4
    flops = (4 if train_head else 2) * entries * width
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=2 * entries)


def _count_entries(blocks: Blocks, vocabulary: int) -> tuple[int, int]:
    """Returns the entries of a block, and the bytes of the statistics of its rows and tiles."""
    tiles = -(-vocabulary // blocks.vocab)
    numbers = tiles * row_statistics.ROW_STATS * blocks.tokens * 4
    return tiles * blocks.vocab * blocks.tokens, numbers


def _count_head(blocks: Blocks, width: int, vocabulary: int) -> int:
    """Returns the numbers in all tiles of the head."""
    return -(-vocabulary // blocks.vocab) * blocks.vocab * width
