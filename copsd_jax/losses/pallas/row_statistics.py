"""Row statistics that the divergence kernels hand from one pass to the next, on TPU and GPU.

Shapes: T is the number of tokens per block. V is the number of vocabulary entries in this shard,
and I is the number of vocabulary tiles in this shard. The student's distribution is
p = softmax(z_s / τ), and the teacher's distribution is q = softmax(z_t / τ).

Each pass over a block writes partial statistics for each row and tile, [I, T]. The functions in
this file combine partial statistics over tiles and vocabulary shards, and compute `TokenStats`.
Each statistic is float32 and takes little memory: T · I numbers for T · V entries.

There are three passes:

    1 logits      maxima, Σ exp, Σ exp · z of both sides  -> log-sum-exps, entropies
    2 sums        Σ e, Σ b, Σ p, Σ q over clipped entries -> value, Σb; see `needs_sums_pass`
    3 gradient    dz = (b - p Σb / Σp) and its matmul; also the head's matmul if the head is trained

Each row has a factor, which is the product of the token clip's factor, the importance ratio, the
weight and 1/τ. At the end of a block, each row of the states' gradient is multiplied by the row's
factor. For the head's gradient, each row of the states is multiplied by the row's factor.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import (
    clips,
    distributions,
    divergences,
    precision,
    split_vocabulary,
    token_blocks,
    token_values,
)

# Divergences that the kernels are tested with. The kernels know ln p and ln q of an entry only up
# to a common constant, so a divergence may use only the difference ln p - ln q.
DIVERGENCES = ("fkl", "rkl", "jsd", "sampled")
ROW_STATS = 8  # a pass reads and writes at most this many statistics per row and tile
EMPTY = -1e30  # logit of a missing entry
FLOOR = -1e29  # lower bound for the maximum of a tile; it lies above EMPTY

Divergence = divergences.Divergence
Sweep = split_vocabulary.Sweep


class TilePartials(NamedTuple):
    """Statistics of one side for each row and tile, [I, T].

    `top_IT` is the maximum of z/τ. With w = exp(z/τ - top), `sum_IT` is Σ w, and `moment_IT` is
    Σ w · (z/τ - top).
    """

    top_IT: jax.Array
    sum_IT: jax.Array
    moment_IT: jax.Array


class RowSoftmax(NamedTuple):
    """Statistics of one side over the whole vocabulary, [T]; the entropy is in nats.

    The log-probability is ln p = (z/τ - top) - log. `top_T` and `log_T` are stored separately,
    because adding log to a large top would lose the digits of log.
    """

    top_T: jax.Array
    log_T: jax.Array
    entropy_T: jax.Array

    def log_prob(self, logit: jax.Array) -> jax.Array:
        """Returns log-probabilities, [T] or [I, T], of logits that are already divided by τ."""
        expand = (None,) * (logit.ndim - 1)
        return (logit - self.top_T[expand]) - self.log_T[expand]


class RowSums(NamedTuple):
    """Sums over the vocabulary, [T]: Σ e, Σ b, Σ p, and the teacher's mass on clipped entries."""

    e_T: jax.Array
    b_T: jax.Array
    p_T: jax.Array
    mass_T: jax.Array


class LogitsResult(NamedTuple):
    """Results of pass 1 for a block, over the whole vocabulary; the last three fields are [T].

    Attributes:
      student, teacher: statistics of each side.
      sampling_T: ln p of the sampled token at the sampling temperature.
      logp_T, logq_T: log-probability of the sampled token under student and teacher at the loss
        temperature.
    """

    student: RowSoftmax
    teacher: RowSoftmax
    sampling_T: jax.Array
    logp_T: jax.Array
    logq_T: jax.Array


class Passes(NamedTuple):
    """The functions that run the passes of a chip's kernels over a block.

    `here_1` is the number of real entries in this shard. `stored` is a tuple of arrays that have
    one column per vocabulary entry; only the kernels read these arrays. All functions except
    `coefficients` also take `settings`, `blocks` and `interpret` as their first three arguments.
    `sweep_blocks` binds these three arguments.

    Attributes:
      logits: takes (here_1, hidden, heads), and returns `stored` and statistics [I, 8, T]. Rows 0
        to 2 of the statistics are the student's `TilePartials`, and rows 3 to 5 are the teacher's
        `TilePartials`. Row 6 of the statistics is the student's Σ exp at the sampling temperature.
      coefficients: takes (result, partials, local_T, Σb/Σp), and returns the numbers that `sums`
        and `gradient` read for each row and tile.
      sums: takes (here_1, coefficients, stored), and returns an array [I, 8, T] with `RowSums` in
        rows 0 to 3.
      gradient: takes (here_1, coefficients, stored, head_VD, head_part). `head_part` is None, or
        (scaled hidden states, head's gradient so far). The function returns dz W [T, D], the sums
        [I, 8, T] (None unless `fuses_sums` returns True), and the head's gradient (or None).
    """

    logits: Callable
    coefficients: Callable
    sums: Callable
    gradient: Callable


def needs_sums_pass(settings: Divergence, train_head: bool) -> bool:
    """Returns whether pass 3 needs sums that only pass 2 can provide.

    Pass 3 needs Σb, unless Σb is 0 in closed form. Pass 3 needs Σe only if a clip changes the
    head's gradient.
    """
    if settings.divergence == "sampled":
        return False
    late = settings.clip_mode != "none" and train_head
    # For fkl, Σb is Σ (p - q) = 0.
    return settings.divergence != "fkl" or settings.clip_mode == "element" or late


def fuses_sums(settings: Divergence, train_head: bool) -> bool:
    """Returns whether pass 3 also computes Σe."""
    return settings.divergence != "sampled" and not needs_sums_pass(settings, train_head)


def sum_shards(x: jax.Array, vocab_axis: str | None) -> jax.Array:
    """Sums x over the shards of the vocabulary; returns an array in the shape of x."""
    return x if vocab_axis is None else jax.lax.psum(x, vocab_axis)


def join_softmax(partials: TilePartials, vocab_axis: str | None, scale: float = 1.0) -> RowSoftmax:
    """Combines the partial statistics of all tiles and shards.

    The result describes softmax(scale · z / τ). `sum_IT` must contain the sums of
    `exp(scale · (z/τ - top))`. The log-probability is ln p = scale · (z/τ - top) - log. `scale`
    multiplies the difference z/τ - top, because scaling z/τ and top separately would round two
    large numbers, and lose the last digits of their difference.
    """
    top_T = jnp.max(partials.top_IT, axis=0)
    if vocab_axis is not None:
        top_T = jax.lax.pmax(top_T, vocab_axis)
    below_IT = (partials.top_IT - top_T[None]) * scale
    weight_IT = jnp.exp(below_IT)
    sum_T = sum_shards(jnp.sum(weight_IT * partials.sum_IT, axis=0), vocab_axis)
    moment_IT = weight_IT * (partials.moment_IT + below_IT * partials.sum_IT)
    mean_T = sum_shards(jnp.sum(moment_IT, axis=0), vocab_axis) / sum_T
    log_T = jnp.log(sum_T)
    return RowSoftmax(top_T, log_T, log_T - mean_T)


def count_entries_here(shard: split_vocabulary.VocabularyShard, size: int) -> jax.Array:
    """Returns how many of the `size` rows of this shard's head are real, as an int32 scalar."""
    if shard.entries is None:
        return jnp.full((), size, jnp.int32)
    entries = jnp.full((), shard.entries, jnp.int32)
    if shard.axis is not None:
        entries -= split_vocabulary.first_entry(shard.axis, size)
    return jnp.clip(entries, 0, size)


def token_logits(
    hidden_TD: jax.Array, head_VD: jax.Array, local_T: jax.Array, vocab_axis: str | None
) -> jax.Array:
    """Returns the logits of the sampled tokens, h_t · W[y_t], shape [T], summed over all shards.

    The function gathers T rows of the head. If the kernels computed the sampled tokens' logits,
    every entry would need a comparison.
    """
    size = head_VD.shape[0]
    row_TD = head_VD[jnp.clip(local_T, 0, size - 1)].astype(jnp.float32)
    logit_T = jnp.sum(hidden_TD.astype(jnp.float32) * row_TD, axis=1)
    return sum_shards(jnp.where((local_T >= 0) & (local_T < size), logit_T, 0), vocab_axis)


def join_logits_pass(
    sweep: Sweep, stats_I8T: jax.Array, hidden: tuple[jax.Array, jax.Array], local_T: jax.Array
) -> tuple[LogitsResult, tuple[TilePartials, ...]]:
    """Combines the tile statistics of pass 1; also returns both sides' partial statistics."""
    settings, heads, axis = sweep.settings, sweep.heads, sweep.shard.axis
    sides = tuple(TilePartials(*(stats_I8T[:, 3 * k + i] for i in range(3))) for k in (0, 1))
    student, teacher = (join_softmax(side, axis) for side in sides)
    logit_s_T, logit_t_T = (
        token_logits(x_TD, head_VD, local_T, axis) * (1 / settings.temperature)
        for x_TD, head_VD in zip(hidden, (heads[0], heads[-1]), strict=True)
    )
    logp_T = sampling_T = student.log_prob(logit_s_T)
    if settings.sampling_temperature != settings.temperature:
        scale = settings.temperature / settings.sampling_temperature
        log_T = join_softmax(sides[0]._replace(sum_IT=stats_I8T[:, 6]), axis, scale).log_T
        sampling_T = (logit_s_T - student.top_T) * scale - log_T
    logq_T = teacher.log_prob(logit_t_T)
    return LogitsResult(student, teacher, sampling_T, logp_T, logq_T), sides


def join_sums(sums_I8T: jax.Array, vocab_axis: str | None) -> RowSums:
    """Sums the results of pass 2 over tiles and shards; returns `RowSums`."""
    sums_8T = sum_shards(jnp.sum(sums_I8T, axis=0), vocab_axis)
    return RowSums(*(sums_8T[k] for k in range(4)))


def finish_stats(
    settings: Divergence, result: LogitsResult, sums: RowSums, inputs: token_values.TokenInputs
) -> tuple[token_values.TokenStats, jax.Array]:
    """Computes TokenStats, and each row's gradient factor [T], which does not include the weight.

    `sums` is not read if the divergence is `sampled`.
    """
    if settings.divergence == "sampled":
        factor_T = result.logq_T - result.logp_T
        value_T, mass_T = -factor_T * result.logp_T, jnp.zeros_like(factor_T)
    else:
        value_T, factor_T = clips.clip_tokens(sums.e_T, settings)
        mass_T = sums.mass_T
        if settings.clip_mode != "element":
            unread = distributions.Distribution(mass_T, mass_T)  # read only if clip_mode is element
            mass_T = clips.clipped_mass(sums.e_T, None, unread, settings)
    old_T, rollout_T = inputs.logp_old_T, inputs.logp_rollout_T
    ratio_T = clips.clip_importance_ratio(result.sampling_T, old_T, rollout_T, settings)
    stats = token_values.TokenStats(
        value_T * ratio_T, result.logp_T, result.logq_T, result.sampling_T,
        result.student.entropy_T, result.teacher.entropy_T, mass_T, ratio_T,
    )  # fmt: skip
    return stats, factor_T * ratio_T * (1 / settings.temperature)


def check_inputs(sweep: Sweep, hidden: tuple[jax.Array, jax.Array]) -> None:
    """Checks that the kernels support the given settings and arrays.

    Raises:
      ValueError: the kernels do not support the divergence, top_k, a dtype, the heads or the
        vocabulary.
    """
    settings, heads, shard, *_ = sweep
    if settings.divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence is {settings.divergence!r}: the kernels support "
            f"{', '.join(DIVERGENCES)}; implementation=chunked supports every divergence"
        )
    if settings.top_k:
        raise ValueError(
            f"top_k is {settings.top_k}: the kernels support only top_k=0; "
            "implementation=chunked supports every top_k"
        )
    dtypes = {x.dtype for x in hidden}
    if len(dtypes) != 1 or not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        raise ValueError(
            f"hidden states are {[str(x.dtype) for x in hidden]}: the kernels need bfloat16 or "
            "float32, and the same dtype on both sides"
        )
    if len({x.shape for x in heads}) != 1:
        raise ValueError(f"the heads are {[x.shape for x in heads]}: their shapes must be equal")
    if shard.entries is not None and shard.entries < 1:
        raise ValueError(
            f"the vocabulary has {shard.entries} entries: at least 1 is needed; None means all "
            "rows of the heads"
        )


def sweep_blocks(
    passes: Passes, sweep: Sweep, rows: tuple, blocks: Any, interpret: bool
) -> tuple[token_values.TokenStats, jax.Array, jax.Array | None]:
    """Runs all passes over blocks of `blocks.tokens` tokens; the last block is padded with zeros.

    Arguments and results have the same meaning and shapes as in `divergence_tpu.sweep`. This
    function rounds the heads to the dtype of the hidden states.
    """
    hidden, inputs = rows
    check_inputs(sweep, hidden)
    heads = tuple(head_VD.astype(hidden[0].dtype) for head_VD in sweep.heads)
    logits, coefficients, *others = passes
    bind = lambda run: functools.partial(run, sweep.settings, blocks, interpret)  # noqa: E731
    bound = Passes(bind(logits), coefficients, *map(bind, others))
    grad_head_VD = jnp.zeros(heads[0].shape, jnp.float32) if sweep.train_head else None
    body = functools.partial(_sweep_block, bound, sweep._replace(heads=heads))
    count = inputs.tokens_T.shape[0]

    def split(x: jax.Array) -> jax.Array:
        x = token_blocks.pad(x, blocks.tokens)
        return x.reshape(-1, blocks.tokens, *x.shape[1:])

    grad_head_VD, out = jax.lax.scan(body, grad_head_VD, jax.tree.map(split, rows))
    stats, grad_TD = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)
    return stats, grad_TD, grad_head_VD


def _sweep_block(
    passes: Passes, sweep: Sweep, grad_head_VD: jax.Array | None, rows: tuple
) -> tuple[jax.Array | None, tuple[token_values.TokenStats, jax.Array]]:
    """Runs all passes over one block: the body of the scan over blocks."""
    hidden, inputs = rows
    settings, heads, axis, local_T = sweep.settings, sweep.heads, sweep.shard.axis, inputs.tokens_T
    size = heads[0].shape[0]
    here_1 = count_entries_here(sweep.shard, size)[None]
    if axis is not None:
        # The result is the token's row in this shard's head. The result is out of range if the
        # token belongs to another shard.
        local_T = local_T - split_vocabulary.first_entry(axis, size)
    stored, stats_I8T = passes.logits(here_1, hidden, heads)
    result, sides = join_logits_pass(sweep, stats_I8T, hidden, local_T)
    zeros_T = jnp.zeros_like(result.logp_T)
    coefficients = passes.coefficients(result, sides, local_T, zeros_T)
    sums = RowSums(*[zeros_T] * 4)
    if needs_sums_pass(settings, sweep.train_head):
        sums = join_sums(passes.sums(here_1, coefficients, stored), axis)
        coefficients = passes.coefficients(result, sides, local_T, sums.b_T / sums.p_T)
    head_part = None
    if grad_head_VD is not None:
        factor_T = finish_stats(settings, result, sums, inputs)[1] * inputs.weight_T
        head_part = precision.scale(hidden[0], factor_T), grad_head_VD
    grad_TD, sums_I8T, grad_head_VD = passes.gradient(
        here_1, coefficients, stored, heads[0], head_part
    )
    if sums_I8T is not None:
        sums = join_sums(sums_I8T, axis)
    stats, factor_T = finish_stats(settings, result, sums, inputs)
    grad_TD = sum_shards(grad_TD, axis) * (factor_T * inputs.weight_T)[:, None]
    return grad_head_VD, (stats, grad_TD.astype(hidden[0].dtype))
