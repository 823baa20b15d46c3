"""The divergence over the whole vocabulary on an NVIDIA GPU, with three matmuls per token.

For each block of N tokens, the matmuls use the vendor's library. Pallas kernels (Triton) do the
work between the matmuls, in tiles of the vocabulary. If both sides share a head, a single matmul
computes the logits of both sides. Logits are stored in float32, so the results are those of
`chunked`.

A row of 151,936 logits does not fit into shared memory, so every pass reads the row again. An entry
is a pair of one token and one vocabulary id. For each entry, the following bytes are moved:

     8  to write the logits
     8  to read the logits for the statistics
     8  to read the logits for Σb (not for `sampled`, nor for forward KL without an element clip)
    10  to read the logits for dz (8), and to write dz (2)
     2  to read dz for its matmul

For example, let T = 8192, D = 4096 and V = 151,936, so that T · V = 1.24e9. The states are
bfloat16, and the GPU is an H200 (989 TFLOP/s, 4.8 TB/s). At the peak rate, the three matmuls take
30.9 ms. Moving the bytes of all T · V entries takes 7.3 ms for forward KL (28 bytes per entry), and
9.3 ms for divergences that need Σb (36 bytes per entry). In total, forward KL takes 1.24 times as
long as the three matmuls alone, and divergences that need Σb take 1.30 times as long. No matmul
reaches the peak rate. With measured times of the matmuls, both ratios are therefore closer to 1.

Letters in array names: I is the number of vocabulary tiles, T the number of tokens per block, and U
the width of a tile.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from copsd_jax.losses import distributions, divergences, precision, split_vocabulary, token_values
from copsd_jax.losses.pallas import block_sizes, row_statistics


def sweep(
    constants: split_vocabulary.Sweep,
    rows: tuple,
    blocks: block_sizes.Blocks,
    interpret: bool = False,
) -> tuple[token_values.TokenStats, jax.Array, jax.Array | None]:
    """Sweeps a device's rows like `divergence_tpu.sweep`, but supports every width.

    Arguments and results have the same meaning and shapes as in `divergence_tpu.sweep`, except that
    the block sizes come from `block_sizes.choose_gpu`.
    """
    tokens = block_sizes.divide_rows_evenly(len(rows[1].tokens_T), blocks.tokens, 8)
    blocks = dataclasses.replace(blocks, tokens=tokens)
    return row_statistics.sweep_blocks(PASSES, constants, rows, blocks, interpret)


def _stack_row_coefficients(
    result: row_statistics.LogitsResult, sides: tuple, local_T: jax.Array, slope_T: jax.Array
) -> jax.Array:
    """Returns the 8 numbers per row that the kernels of passes 2 and 3 read, [T, 8].

    Columns 0 and 1 are the student's maximum and ln Σ exp. Columns 2 and 3 are the teacher's
    maximum and ln Σ exp. Column 4 is Σb/Σp. Column 5 is the sampled token's row in this shard.
    Column 6 is p - 1 of the sampled token. Column 7 is 0.
    """
    del sides
    place_T = local_T.astype(jnp.float32)
    softmax = [*result.student[:2], *result.teacher[:2]]
    rest = [slope_T, place_T, jnp.expm1(result.logp_T), jnp.zeros_like(slope_T)]
    return jnp.stack([*softmax, *rest], axis=1)


# --- kernels: one row and one tile per program ----------------------------------------------------


def _load_tile_logits(
    settings: divergences.Divergence, logits_ref, row, width: int, here: jax.Array
):
    """Returns z / τ of a tile, with EMPTY for missing entries, and a mask of the real entries."""
    start = pl.program_id(1) * width
    real_U = start + jnp.arange(width, dtype=jnp.int32) < here
    z_U = plgpu.load(logits_ref.at[row, pl.ds(start, width)], mask=real_U, other=0.0)
    if settings.temperature != 1:
        z_U = z_U * (1 / settings.temperature)
    return jnp.where(real_U, z_U, row_statistics.EMPTY), real_U


def _load_both_logits(settings, logits_refs, width: int, here: jax.Array):
    """Loads z / τ of a tile for both sides; also returns a mask of real entries."""
    row = pl.program_id(0)
    # Either one array has the student's rows followed by the teacher's rows, or each side has its
    # own array.
    below = pl.num_programs(0) if len(logits_refs) == 1 else 0
    student_U, real_U = _load_tile_logits(settings, logits_refs[0], row, width, here)
    teacher_U, _ = _load_tile_logits(settings, logits_refs[-1], row + below, width, here)
    return student_U, teacher_U, real_U


def _write_tile_sums(numbers_ref, numbers: list[jax.Array]) -> None:
    """Writes up to 8 numbers of this row and tile to [I, 8, T]; writes 0 for missing numbers."""
    row, tile = pl.program_id(0), pl.program_id(1)
    for k in range(row_statistics.ROW_STATS):
        value = numbers[k] if k < len(numbers) else jnp.zeros((), jnp.float32)
        numbers_ref[tile, k, row] = value


def _logits_kernel(settings, width, here_ref, *refs):
    """Writes the maxima and sums of a tile (pass 1)."""
    *logits_refs, stats_ref = refs
    numbers, below = [], []
    for z_U in _load_both_logits(settings, logits_refs, width, here_ref[0])[:2]:
        top = jnp.maximum(jnp.max(z_U), row_statistics.FLOOR)
        below.append(z_U - top)
        weight_U = jnp.exp(below[-1])
        numbers += [top, jnp.sum(weight_U), jnp.sum(weight_U * below[-1])]
    if settings.sampling_temperature != settings.temperature:
        scale = settings.temperature / settings.sampling_temperature
        numbers.append(jnp.sum(jnp.exp(below[0] * scale)))
    _write_tile_sums(stats_ref, numbers)


def _load_tile_distributions(settings, logits_refs, width, here, row_ref):
    """Returns both sides' distributions (0 after the last real entry), and row coefficients."""
    student_U, teacher_U, real_U = _load_both_logits(settings, logits_refs, width, here)
    row = pl.program_id(0)
    sides = []
    for k, z_U in enumerate((student_U, teacher_U)):
        log_U = (z_U - row_ref[row, 2 * k]) - row_ref[row, 2 * k + 1]
        log_U = jnp.where(real_U, log_U, 0.0)
        sides.append(distributions.Distribution(jnp.where(real_U, jnp.exp(log_U), 0.0), log_U))
    return *sides, [row_ref[row, k] for k in (4, 5, 6)]


def _sums_kernel(settings, width, here_ref, row_ref, *refs):
    """Writes a tile's sums of e, of b, of p and of the teacher's clipped mass (pass 2)."""
    *logits_refs, sums_ref = refs
    student, teacher, _ = _load_tile_distributions(
        settings, logits_refs, width, here_ref[0], row_ref
    )
    e_U, b_U, clipped_U = divergences.compute_entries(student, teacher, settings)
    numbers = [jnp.sum(e_U), jnp.sum(b_U), jnp.sum(student.p)]
    if clipped_U is not None:
        numbers.append(jnp.sum(jnp.where(clipped_U, teacher.p, 0.0)))
    _write_tile_sums(sums_ref, numbers)


def _gradient_kernel(settings, width, sums, logits, here_ref, row_ref, *refs):
    """Writes dz of a tile (pass 3)."""
    logits_refs, dz_ref = refs[:logits], refs[logits]
    student, teacher, numbers = _load_tile_distributions(
        settings, logits_refs, width, here_ref[0], row_ref
    )
    slope, place, miss = numbers
    start = pl.program_id(1) * width
    entry_U = start + jnp.arange(width, dtype=jnp.int32)
    if settings.divergence == "sampled":
        dz_U = jnp.where(entry_U == place.astype(jnp.int32), miss, student.p)
    else:
        e_U, b_U, _ = divergences.compute_entries(student, teacher, settings)
        dz_U = b_U if sums else b_U - student.p * slope
        if sums:
            _write_tile_sums(refs[logits + 1], [jnp.sum(e_U)])
    to = dz_ref.at[pl.program_id(0), pl.ds(start, width)]
    plgpu.store(to, dz_U.astype(dz_ref.dtype), mask=entry_U < dz_ref.shape[1])


# --- passes --------------------------------------------------------------------------------------


def _call_divergence_kernel(
    kernel, name: str, blocks, interpret, operands, out_shape, entry_bytes: int
):
    """Runs a program for each row and tile; arrays are in HBM; the last operand has V columns."""
    tokens = out_shape[0].shape[-1] if out_shape[0].ndim == 3 else out_shape[0].shape[0]
    size = operands[-1].shape[1]
    entries = tokens * size
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=(tokens, -(-size // blocks.vocab)),
        in_specs=[whole] * len(operands),
        out_specs=[whole] * len(out_shape),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=0, bytes_accessed=entries * entry_bytes, transcendentals=2 * entries
        ),
        interpret=interpret,
        name=name,
    )(*operands)


def _numbers(tokens: int, size: int, blocks: block_sizes.Blocks) -> jax.ShapeDtypeStruct:
    tiles = -(-size // blocks.vocab)
    return jax.ShapeDtypeStruct((tiles, row_statistics.ROW_STATS, tokens), jnp.float32)


def _logits_pass(settings, blocks, interpret, here_1, hidden, heads) -> tuple:
    """Returns the logits (one array [2T, V], or two arrays [T, V]) and the statistics [I, 8, T]."""
    rows = (jnp.concatenate(hidden),) if len(heads) == 1 else hidden
    stored = tuple(precision.dot(*pair, 1, 1) for pair in zip(rows, heads, strict=True))
    kernel = functools.partial(_logits_kernel, settings, blocks.vocab)
    shape = _numbers(hidden[0].shape[0], heads[0].shape[0], blocks)
    operands = (here_1, *stored)
    return stored, _call_divergence_kernel(
        kernel, "divergence_stats", blocks, interpret, operands, [shape], 8
    )[0]


def _sums_pass(settings, blocks, interpret, here_1, coefficients_T8, stored) -> jax.Array:
    """Returns the sums of pass 2, [I, 8, T]."""
    kernel = functools.partial(_sums_kernel, settings, blocks.vocab)
    shape = _numbers(coefficients_T8.shape[0], stored[0].shape[1], blocks)
    operands = (here_1, coefficients_T8, *stored)
    return _call_divergence_kernel(
        kernel, "divergence_sums", blocks, interpret, operands, [shape], 8
    )[0]


def _gradient_pass(
    settings, blocks, interpret, here_1, coefficients_T8, stored, head_VD, head_part
) -> tuple:
    """Returns dz W [T, D], the sums [I, 8, T] (or None), and the head's gradient (or None)."""
    (tokens, _), (size, _) = coefficients_T8.shape, head_VD.shape
    fused = row_statistics.fuses_sums(settings, head_part is not None)
    kernel = functools.partial(_gradient_kernel, settings, blocks.vocab, fused, len(stored))
    shapes = [jax.ShapeDtypeStruct((tokens, size), head_VD.dtype)]
    if fused:
        shapes.append(_numbers(tokens, size, blocks))
    operands, moved = (here_1, coefficients_T8, *stored), 8 + head_VD.dtype.itemsize
    dz_TV, *sums = _call_divergence_kernel(
        kernel, "divergence_gradient", blocks, interpret, operands, shapes, moved
    )
    grad_head_VD = None
    if head_part is not None:
        grad_head_VD = head_part[1] + precision.dot(dz_TV, head_part[0], 0, 0)
    return precision.dot(dz_TV, head_VD, 1, 0), sums[0] if fused else None, grad_head_VD


PASSES = row_statistics.Passes(_logits_pass, _stack_row_coefficients, _sums_pass, _gradient_pass)
