"""The divergence over the whole vocabulary on a TPU (Mosaic), with three matmuls per token.

One matmul with T tokens, width D and vocabulary V takes 2 · T · D · V FLOP. At least three matmuls
are needed: the student's logits, the teacher's logits, and the gradient of the hidden states. The
head's gradient needs a fourth matmul. The floor is the time that the needed matmuls take at the
chip's peak rate.

For JSD, reverse KL and the element clip, both log-sum-exps must be known before any gradient is
computed, and Σb must be known before dz = b - p · Σb is computed. The log-sum-exps and Σb can be
computed in several ways. The list gives the cost of each way for T = 32,768, D = 2048 and
V = 151,936 in bfloat16; T · V is then 4.98e9. For these sizes, the floor is 310.6 ms on v5e and
66.6 ms on v6e.

- The logits are computed again. Five matmuls take 1.67 floors.
- The logits are stored in float32. A sweep moves 16 bytes per entry (80 GB), or 24 bytes per entry
  (119 GB) if Σb is needed. On v5e, JSD takes 1.47 floors.
- The logits are stored in bfloat16. A sweep moves 8 or 12 bytes per entry. The difference p - q is
  lost where p and q are close.
- Each entry is stored in 32 bits, as in this file. A sweep moves 8 or 12 bytes per entry (40 or
  60 GB).

In addition, passes 1 and 3 each read the head once per block of N tokens. Both passes together read
2 · (T / N) · V · D · 2 bytes of the head: 10 GB for N = 4096, or 20 GB for N = 2048. The estimated
time of a sweep is the number of FLOP divided by the chip's peak, plus the number of bytes divided
by the bandwidth. The estimate assumes that vector work overlaps with the work of the matrix unit.
On v5e, N is 2048, because v5e has only 16 GB of HBM; on v6e, N is 4096. By this estimate, forward
KL takes 1.24 times as long as the needed matmuls alone on v5e, and 1.47 times as long on v6e. JSD
and clipped divergences take 1.32 times as long as the needed matmuls alone on v5e, and 1.66 times
as long on v6e. For every T, HBM holds the stored entries [N, V] of only one block at a time.

In each row of a tile, m_s and m_t are the maxima of the student's and of the teacher's logits. An
entry is stored as two numbers relative to m_s and m_t. The first number is the larger of
P = exp(z_s - m_s) and Q = exp(z_t - m_t). The second number is d = (z_t - m_t) - (z_s - m_s). The
smaller of P and Q equals the larger of P and Q, times exp(-|d|).

If the states are bfloat16, both stored numbers are rounded to 10 bits after the leading bit. The
rounded numbers cover values of the first number down to 2^-63, and |d| from 2^-16 to 2^16. The
relative error of the larger probability and of d is at most 2^-11. Therefore the relative error of
p - q is at most 2^-10, and the relative error of every entry's divergence is at most 2^-9, however
close p and q are. If both sides are equal, the divergence is exactly zero. For comparison, rounding
dz to bfloat16 before the matmul causes a relative error of 2^-8. If an entry is within 2^-9 of κ,
rounding may decide whether the entry is clipped. If the states are float32, both stored numbers
remain float32. Log-sum-exps, entropies and log-probabilities are computed from unrounded logits.
Rounding adds an error to Σp, and dividing by Σp removes this error from dz.

Letters in array names: I is the number of vocabulary tiles, T the number of tokens per block, R the
number of rows per grid step, and U the width of a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from copsd_jax.losses import distributions, divergences, precision, split_vocabulary, token_values
from copsd_jax.losses.pallas import block_sizes, row_statistics

STRIP = 16  # number of rows per step of elementwise work; so few that values stay in registers


def sweep(
    constants: split_vocabulary.Sweep,
    rows: tuple,
    blocks: block_sizes.Blocks,
    interpret: bool = False,
) -> tuple[token_values.TokenStats, jax.Array, jax.Array | None]:
    """Computes the statistics, and the gradients of Σ weight · value, in one sweep over all blocks.

    Call this function on a single device, or inside shard_map with each device's tokens.

    Args:
      constants: constants of the sweep. The heads are rounded to the dtype of the hidden states. If
        both sides share a head, each tile of the head is read only once. Maxima, sums and the
        states' gradient are reduced over `shard.axis`. The states' gradient is always computed.
      rows: (hidden, inputs); hidden contains the states of student and teacher, [T, D] each, and
        inputs is a `TokenInputs`. The states are float32 or bfloat16, and D is a multiple of 128.
      blocks: see `block_sizes.choose_tpu`.
      interpret: whether the kernels run in interpret mode.

    Returns:
      stats: `TokenStats`, float32 [T].
      grad_hidden_TD: gradient of the student's states, in the dtype of the states.
      grad_head_VD: float32 gradient of the student's head; None unless `train_head` is set.

    Raises:
      ValueError: the kernels do not support the divergence, top_k, a dtype or the width.
    """
    width = rows[0][0].shape[1]
    if width % block_sizes.LANES:
        raise ValueError(
            f"the width is {width}: the TPU kernels need a multiple of {block_sizes.LANES}; "
            "loss.implementation=chunked supports every width"
        )
    blocks = block_sizes.fit(blocks, len(rows[1].tokens_T))
    return row_statistics.sweep_blocks(PASSES, constants, rows, blocks, interpret)


def _stack_tile_coefficients(
    result: row_statistics.LogitsResult, sides: tuple, local_T: jax.Array, slope_T: jax.Array
) -> jax.Array:
    """Returns the 8 numbers per row and tile that the kernels of passes 2 and 3 read, [I, 8, T].

    Number 0 is p/P, number 1 is q/Q, and number 2 is (ln q - ln p) - d. Number 3 is Σb/Σp. Number 4
    is the sampled token's row in this shard. Number 5 is p - 1 of the sampled token. Numbers 6 and
    7 are 0.
    """
    log_s_IT = result.student.log_prob(sides[0].top_IT)
    log_t_IT = result.teacher.log_prob(sides[1].top_IT)
    rows = (slope_T, local_T.astype(jnp.float32), jnp.expm1(result.logp_T))
    rows_IT = [jnp.broadcast_to(row_T, log_s_IT.shape) for row_T in rows]
    sides_IT = [jnp.exp(log_s_IT), jnp.exp(log_t_IT), log_t_IT - log_s_IT]
    return jnp.stack([*sides_IT, *rows_IT, *[jnp.zeros_like(log_s_IT)] * 2], axis=1)


# --- stored entries ----------------------------------------------------------------------------

MANTISSA = 10  # number of mantissa bits in a 16-bit code
SHIFT = 23 - MANTISSA
LARGER_BASE = (127 - 63) << MANTISSA  # the smallest code stands for 2^-63
GAP_BASE = (127 - 16) << MANTISSA  # the smallest code stands for 2^-16


def _encode_divergence_entry(x: jax.Array, base: int, most: int) -> jax.Array:
    """Encodes float32 x >= 0 as an integer up to `most`; values below the smallest code give 0."""
    # Half a unit of the last kept bit is added first, so that the shift rounds to the nearest code.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) + (1 << (SHIFT - 1))
    return jnp.clip((bits >> SHIFT) - base, 0, most)


def _decode_divergence_entry(code: jax.Array, base: int) -> jax.Array:
    x = jax.lax.bitcast_convert_type((code + base) << SHIFT, jnp.float32)
    return jnp.where(code == 0, 0.0, x)


def pack(larger: jax.Array, gap: jax.Array) -> jax.Array:
    """Packs two float32 arrays into one int32 array of the same shape.

    The upper 16 bits encode `larger`, which is in [0, 1]. The lower 16 bits encode `gap` with its
    sign; |gap| is below 2^16.
    """
    code = _encode_divergence_entry(jnp.abs(gap), GAP_BASE, 0x7FFF) | jnp.where(gap < 0, 0x8000, 0)
    return (_encode_divergence_entry(larger, LARGER_BASE, 0xFFFF) << 16) | code


def unpack(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unpacks `larger` and `gap`, as rounded by `pack`; both have the shape of `word`."""
    gap = _decode_divergence_entry(word & 0x7FFF, GAP_BASE)
    larger = _decode_divergence_entry(jax.lax.shift_right_logical(word, 16), LARGER_BASE)
    return larger, jnp.where((word & 0x8000) != 0, -gap, gap)


# --- kernels -----------------------------------------------------------------------------------


def _load_head_tile(head_ref, here) -> jax.Array:
    """Loads a tile of the head; sets the undefined rows after the last real entry to 0."""
    tile_UD = head_ref[...]
    entry_U1 = jax.lax.broadcasted_iota(jnp.int32, (tile_UD.shape[0], 1), 0)
    entry_U1 = entry_U1 + pl.program_id(0) * tile_UD.shape[0]
    return jnp.where(entry_U1 < here, tile_UD, jnp.zeros((), tile_UD.dtype))


def _rows(step: jax.Array, size: int):
    return pl.ds(pl.multiple_of(step * size, size), size)


def _strips(count: int, work) -> None:
    """Calls `work` on the rows of each strip, one strip after another."""
    jax.lax.fori_loop(0, count // STRIP, lambda k, _: work(_rows(k, STRIP)), None)


def _columns(numbers: list[jax.Array]) -> jax.Array:
    """Combines arrays [S, 1] into one array [S, 128]: array k fills lane k; other lanes are 0."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (numbers[0].shape[0], block_sizes.LANES), 1)
    out = jnp.zeros(lane.shape, jnp.float32)
    for k, number in enumerate(numbers):
        out = jnp.where(lane == k, number, out)
    return out


def _transposed(ref) -> jax.Array:
    """Transposes a block [1, 8, R] to [R, 128]; the added lanes are 0."""
    rows_8R = ref[0]
    blank = jnp.zeros((block_sizes.LANES - row_statistics.ROW_STATS, rows_8R.shape[1]), jnp.float32)
    return jnp.concatenate([rows_8R, blank], axis=0).T


def _logits_kernel(settings, heads, here_ref, hidden_s_ref, hidden_t_ref, *refs):
    """Writes one tile's stored entries and statistics for the rows of a grid step (pass 1)."""
    head_refs, stored_refs, (stats_ref, z_ref, column_ref) = refs[:heads], refs[heads:-3], refs[-3:]
    count, width = z_ref.shape[1:]
    rows = _rows(pl.program_id(1), count)
    tiles = [_load_head_tile(ref, here_ref[0]) for ref in head_refs]
    for k, hidden_ref in enumerate((hidden_s_ref, hidden_t_ref)):
        z_ref[k] = precision.dot(hidden_ref[rows, :], tiles[k % heads], 1, 1)
    entry_1U = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) + pl.program_id(0) * width
    real_1U = entry_1U < here_ref[0]
    scale = 1 / settings.temperature

    def work(strip) -> None:
        numbers, below, weights = [], [], []
        for k in (0, 1):
            z = z_ref[k, strip, :] if scale == 1 else z_ref[k, strip, :] * scale
            z = jnp.where(real_1U, z, row_statistics.EMPTY)
            top = jnp.maximum(jnp.max(z, axis=1, keepdims=True), row_statistics.FLOOR)
            below.append(z - top)
            weights.append(jnp.exp(below[k]))
            moment = jnp.sum(weights[k] * below[k], axis=1, keepdims=True)
            numbers += [top, jnp.sum(weights[k], axis=1, keepdims=True), moment]
        if settings.sampling_temperature != settings.temperature:
            sampling = jnp.exp(below[0] * (settings.temperature / settings.sampling_temperature))
            numbers.append(jnp.sum(sampling, axis=1, keepdims=True))
        values = jnp.maximum(*weights), below[1] - below[0]
        values = values if len(stored_refs) == 2 else (pack(*values),)
        for ref, value in zip(stored_refs, values, strict=True):
            ref[strip, :] = value
        column_ref[strip, :] = _columns(numbers)

    _strips(count, work)
    stats_ref[0] = column_ref[...].T[: row_statistics.ROW_STATS]


def _load_both_distributions(
    stored_refs, strip, column: jax.Array
) -> list[distributions.Distribution]:
    """Computes both sides' distributions of a strip from stored entries and row coefficients.

    ln p is subtracted from both logarithms, so the student's logarithms are 0. The subtraction is
    harmless, because divergences use only the difference of the two logarithms.
    """
    stored = tuple(ref[strip, :] for ref in stored_refs)
    larger, gap = stored if len(stored) == 2 else unpack(stored[0])
    smaller = larger * jnp.exp(-jnp.abs(gap))
    p = jnp.where(gap > 0, smaller, larger) * column[:, 0:1]
    q = jnp.where(gap > 0, larger, smaller) * column[:, 1:2]
    log = gap + column[:, 2:3]
    return [distributions.Distribution(*x) for x in ((p, jnp.zeros_like(p)), (q, log))]


def _sums_kernel(settings, coefficients_ref, *refs):
    """Writes a tile's sums of e, of b, of p and of the teacher's clipped mass (pass 2)."""
    stored_refs, (sums_ref, column_ref) = refs[:-2], refs[-2:]
    column_ref[...] = _transposed(coefficients_ref)

    def work(strip) -> None:
        student, teacher = _load_both_distributions(stored_refs, strip, column_ref[strip, :])
        e, b, clipped = divergences.compute_entries(student, teacher, settings)
        parts = [e, b, student.p]
        if clipped is not None:
            parts.append(jnp.where(clipped, teacher.p, 0.0))
        column_ref[strip, :] = _columns([jnp.sum(x, axis=1, keepdims=True) for x in parts])

    _strips(column_ref.shape[0], work)
    sums_ref[0] = column_ref[...].T[: row_statistics.ROW_STATS]


def _gradient_kernel(settings, sums, stored, head_part, here_ref, coefficients_ref, *refs):
    """Computes dz of a tile, and adds dz times the head's tile to a sum in VMEM (pass 3)."""
    stored_refs, head_ref, refs = refs[:stored], refs[stored], list(refs[stored + 1 :])
    missing: Any = None
    scaled_ref, old_ref = (refs.pop(0), refs.pop(0)) if head_part else (missing, missing)
    grad_ref = refs.pop(0)
    sums_ref = refs.pop(0) if sums else missing
    new_ref = refs.pop(0) if head_part else missing
    total_ref, dz_ref, column_ref = refs
    tile, step = pl.program_id(0), pl.program_id(1)
    rows = _rows(step, dz_ref.shape[0])
    column_ref[...] = _transposed(coefficients_ref)

    def work(strip) -> None:
        column = column_ref[strip, :]
        student, teacher = _load_both_distributions(stored_refs, strip, column)
        if settings.divergence == "sampled":
            entry_1U = jax.lax.broadcasted_iota(jnp.int32, (1, dz_ref.shape[1]), 1)
            place = column[:, 4:5].astype(jnp.int32) - tile * dz_ref.shape[1]
            dz = jnp.where(entry_1U == place, column[:, 5:6], student.p)
        else:
            e, b, _ = divergences.compute_entries(student, teacher, settings)
            dz = b if sums else b - student.p * column[:, 3:4]
            if sums:
                column_ref[strip, :] = _columns([jnp.sum(e, axis=1, keepdims=True)])
        dz_ref[strip, :] = dz.astype(dz_ref.dtype)

    _strips(dz_ref.shape[0], work)
    if sums:
        sums_ref[0] = column_ref[...].T[: row_statistics.ROW_STATS]
    product = precision.dot(dz_ref[...], _load_head_tile(head_ref, here_ref[0]), 1, 0)

    @pl.when(tile == 0)
    def _():
        total_ref[rows, :] = product

    @pl.when(tile > 0)
    def _():
        total_ref[rows, :] += product

    if head_part:
        product_UD = precision.dot(dz_ref[...], scaled_ref[rows, :], 0, 0)

        @pl.when(step == 0)
        def _():
            new_ref[...] = old_ref[...] + product_UD

        @pl.when(step > 0)
        def _():
            new_ref[...] += product_UD

    @pl.when(tile == pl.num_programs(0) - 1)
    def _():
        pltpu.sync_copy(total_ref.at[rows, :], grad_ref.at[rows, :])


# --- the passes --------------------------------------------------------------------------------


def _whole(array: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """Returns the spec of an array that stays in VMEM, as a single copy, for all grid steps."""
    return pl.BlockSpec(array.shape, lambda i, r: (0, 0), pipeline_mode=pl.Buffered(1))


def _build_sweep_specs(blocks: block_sizes.Blocks, width: int) -> tuple[pl.BlockSpec, ...]:
    """Returns three block specs: for tiles of the head, for stored entries, and for row statistics.

    The grid is [I, T/R]. The outer axis of the grid runs over the tiles of the head, so each tile
    is read only once for all rows of a block.
    """
    head = pl.BlockSpec((blocks.vocab, width), lambda i, r: (i, 0))
    entries = pl.BlockSpec((blocks.rows, blocks.vocab), lambda i, r: (r, i))
    numbers = pl.BlockSpec((1, row_statistics.ROW_STATS, blocks.rows), lambda i, r: (i, 0, r))
    return head, entries, numbers


def _grid(blocks: block_sizes.Blocks, size: int) -> tuple[int, int]:
    return -(-size // blocks.vocab), blocks.tokens // blocks.rows


def _params(need: int, *order: Any) -> pltpu.CompilerParams:
    """Returns compiler parameters; a chip's two cores split the axes marked parallel in `order`."""
    limit = block_sizes.compute_loss_vmem_limit(need)
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=limit)


SCALAR = pl.BlockSpec(memory_space=pltpu.SMEM)


def _logits_pass(settings, blocks, interpret, here_1, hidden, heads) -> tuple:
    """Returns the stored entries [T, V], as one or two arrays, and the statistics [I, 8, T]."""
    (size, width), dtype = heads[0].shape, hidden[0].dtype
    grid = _grid(blocks, size)
    head, stored, numbers = _build_sweep_specs(blocks, width)
    stored_dtypes = (jnp.int32,) if dtype == jnp.bfloat16 else (jnp.float32,) * 2
    need = block_sizes.count_loss_vmem(blocks, width, dtype, tied=len(heads) == 1, train_head=False)
    entries = (blocks.tokens, grid[0] * blocks.vocab)
    *stored_TV, stats_I8T = pl.pallas_call(
        functools.partial(_logits_kernel, settings, len(heads)),
        grid=grid,
        in_specs=[SCALAR, _whole(hidden[0]), _whole(hidden[1]), *[head] * len(heads)],
        out_specs=[*[stored] * len(stored_dtypes), numbers],
        out_shape=[
            *(jax.ShapeDtypeStruct(entries, x) for x in stored_dtypes),
            jax.ShapeDtypeStruct((grid[0], row_statistics.ROW_STATS, blocks.tokens), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((2, blocks.rows, blocks.vocab), jnp.float32),
            pltpu.VMEM((blocks.rows, block_sizes.LANES), jnp.float32),
        ],
        compiler_params=_params(need, "parallel", "parallel"),
        cost_estimate=block_sizes.estimate_logits_cost(blocks, width, size, dtype, len(heads)),
        interpret=interpret,
        name="divergence_logits",
    )(here_1, *hidden, *heads)
    return tuple(stored_TV), stats_I8T


def _sums_pass(settings, blocks, interpret, here_1, coefficients_I8T, stored) -> jax.Array:
    """Returns the sums of pass 2, [I, 8, T]."""
    del here_1  # pass 1 has stored 0 for all entries after the last real entry
    _, entries, numbers = _build_sweep_specs(blocks, 0)
    size = stored[0].shape[1]
    return pl.pallas_call(
        functools.partial(_sums_kernel, settings),
        grid=_grid(blocks, size),
        in_specs=[numbers, *[entries] * len(stored)],
        out_specs=numbers,
        out_shape=jax.ShapeDtypeStruct(coefficients_I8T.shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM((blocks.rows, block_sizes.LANES), jnp.float32)],
        compiler_params=_params(8 * blocks.rows * blocks.vocab * 4, "parallel", "parallel"),
        cost_estimate=block_sizes.estimate_sums_cost(blocks, size, 4 * len(stored)),
        interpret=interpret,
        name="divergence_sums",
    )(coefficients_I8T, *stored)


def _gradient_pass(
    settings, blocks, interpret, here_1, coefficients_I8T, stored, head_VD, head_part
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns dz W [T, D] without the row factors, the sums [I, 8, T], and the head's gradient.

    The sums are None unless `fuses_sums` returns True. `head_part` is (scaled hidden states, head's
    gradient so far), and the head's gradient is updated in place. If `head_part` is None, the
    head's gradient is None.
    """
    (size, width), dtype = head_VD.shape, head_VD.dtype
    train_head = head_part is not None
    fused = row_statistics.fuses_sums(settings, train_head)
    head, entries, numbers = _build_sweep_specs(blocks, width)
    grad = jax.ShapeDtypeStruct((blocks.tokens, width), jnp.float32)
    operands = [here_1, coefficients_I8T, *stored, head_VD]
    in_specs = [SCALAR, numbers, *[entries] * len(stored), head]
    outs = [(grad, pl.BlockSpec(memory_space=pl.ANY))]
    if fused:
        outs.append((jax.ShapeDtypeStruct(coefficients_I8T.shape, jnp.float32), numbers))
    aliases = {}
    if head_part is not None:
        aliases = {len(operands) + 1: len(outs)}
        operands += head_part
        in_specs += [_whole(head_part[0]), head]
        outs.append((jax.ShapeDtypeStruct((size, width), jnp.float32), head))
    need = block_sizes.count_loss_vmem(blocks, width, dtype, tied=True, train_head=train_head)
    out = pl.pallas_call(
        functools.partial(_gradient_kernel, settings, fused, len(stored), train_head),
        grid=_grid(blocks, size),
        in_specs=in_specs,
        out_specs=[spec for _, spec in outs],
        out_shape=[shape for shape, _ in outs],
        scratch_shapes=[
            pltpu.VMEM((blocks.tokens, width), jnp.float32),
            pltpu.VMEM((blocks.rows, blocks.vocab), dtype),
            pltpu.VMEM((blocks.rows, block_sizes.LANES), jnp.float32),
        ],
        input_output_aliases=aliases,
        compiler_params=_params(need, "arbitrary", "arbitrary" if train_head else "parallel"),
        cost_estimate=block_sizes.estimate_gradient_cost(
            blocks, width, size, dtype, fused, train_head
        ),
        interpret=interpret,
        name="divergence_gradient",
    )(*operands)
    return out[0], out[1] if fused else None, out[-1] if train_head else None


PASSES = row_statistics.Passes(_logits_pass, _stack_tile_coefficients, _sums_pass, _gradient_pass)
