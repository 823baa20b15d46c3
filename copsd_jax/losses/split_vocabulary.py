"""The closed forms of `token_values`, for a vocabulary that is split over devices.

For a block of T rows, the devices of the mesh axis exchange these numbers:

    2 · T  maxima of the rows, for student and teacher
    7 · T  sums of exponentials, sums of exponentials times logarithms, logits of the sampled tokens
    3 · T  sums of e, sums of b, clipped mass
    T · D  gradient of the states (exchanged by `chunked`)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import clips, distributions, divergences, token_values

Distribution = distributions.Distribution
Divergence = divergences.Divergence


class VocabularyShard(NamedTuple):
    """A device's part of the vocabulary; device i of a mesh axis has the i-th of n equal parts.

    Attributes:
      axis: the mesh axis that splits the vocabulary; None if every device has the whole vocabulary.
      entries: number of real entries in the whole vocabulary. The rows of a head after the last
        real entry are padding. None means that no row is padding; only tests and benchmarks of the
        kernels pass None.
    """

    axis: str | None
    entries: int | None


class Sweep(NamedTuple):
    """Constants of one device's sweep, shared by all blocks of the sweep.

    Attributes:
      settings: settings of the divergence.
      heads: this device's rows of the student's head and of the teacher's head, [V, D] each. If
        both sides share a head, the tuple contains only one array. Padding rows get no probability
        and no gradient.
      shard: this device's part of the vocabulary.
      gradient: whether to compute the gradient of the student's states.
      train_head: whether to compute the gradient of the student's head.
    """

    settings: Divergence
    heads: tuple[jax.Array, ...]
    shard: VocabularyShard
    gradient: bool = True
    train_head: bool = False


def first_entry(axis: str, count: int) -> jax.Array:
    """Returns the id of this device's first entry, an int32 scalar.

    Every device has `count` entries.
    """
    return jax.lax.axis_index(axis).astype(jnp.int32) * count


def score_shard_block(
    logits_s_TV: jax.Array,
    logits_t_TV: jax.Array,
    inputs: token_values.TokenInputs,
    settings: Divergence,
    axis: str,
) -> tuple[token_values.TokenStats, jax.Array]:
    """Scores a block of tokens like `token_values.score_divergence_block`, but without top-k.

    Args:
      logits_s_TV: this device's part of the student's logits; V is the number of entries in this
        part.
      logits_t_TV: the same part of the teacher's logits.
      inputs: arrays [T]; the tokens are ids in the whole vocabulary.
      settings: settings of the divergence.
      axis: the mesh axis that splits the vocabulary.

    Returns:
      The statistics, and this device's part [T, V] of the logits' gradient. The statistics are
      equal on all devices.
    """
    tokens_T, _, logp_old_T, logp_rollout_T = inputs
    factor, sampling = 1 / settings.temperature, 1 / settings.sampling_temperature
    top_s_T1, top_t_T1 = _row_maxima([logits_s_TV, logits_t_TV], axis)
    below_TV = logits_s_TV - top_s_T1
    x_s_TV, x_t_TV = below_TV * factor, (logits_t_TV - top_t_T1) * factor
    w_s_TV, w_t_TV = jnp.exp(x_s_TV), jnp.exp(x_t_TV)
    total_s_T, total_t_T, total_y_T, log_s_T, log_t_T, y_s_T, y_t_T = _sum_parts(
        [_sum_row(w_s_TV), _sum_row(w_t_TV), _sum_row(jnp.exp(below_TV * sampling)),
         _sum_row(w_s_TV * x_s_TV), _sum_row(w_t_TV * x_t_TV),
         _pick_here(below_TV, tokens_T, axis), _pick_here(x_t_TV, tokens_T, axis)], axis,
    )  # fmt: skip
    student = _distribution(x_s_TV, w_s_TV, total_s_T)
    teacher = _distribution(x_t_TV, w_t_TV, total_t_T)
    logp_T = y_s_T * factor - jnp.log(total_s_T)
    logq_T = y_t_T - jnp.log(total_t_T)
    sampling_T = y_s_T * sampling - jnp.log(total_y_T)
    value_T, dz_TV, mass_T = _compute_shard_divergence(
        student, teacher, (logp_T, logq_T), tokens_T, settings, axis
    )
    ratio_T = clips.clip_importance_ratio(sampling_T, logp_old_T, logp_rollout_T, settings)
    stats = token_values.TokenStats(
        value_T * ratio_T, logp_T, logq_T, sampling_T,
        jnp.log(total_s_T) - log_s_T / total_s_T, jnp.log(total_t_T) - log_t_T / total_t_T,
        mass_T, ratio_T,
    )  # fmt: skip
    return stats, dz_TV * (factor * ratio_T)[:, None]


def _compute_shard_divergence(
    student: Distribution, teacher: Distribution, log_probs, tokens_T, settings: Divergence, axis
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the value [T], this device's part [T, V] of the gradient, and the clipped mass [T].

    The gradient is with respect to logits / τ. `log_probs` contains the sampled tokens'
    log-probabilities under student and teacher, [T] each.
    """
    if settings.divergence == "sampled":
        logp_T, logq_T = log_probs
        advantage_T = logq_T - logp_T
        value_T, mass_T = -advantage_T * logp_T, jnp.zeros_like(logp_T)
        return value_T, advantage_T[:, None] * _subtract_one_hot(student, tokens_T, axis), mass_T
    e_TV, b_TV, clipped_TV = divergences.compute_entries(student, teacher, settings)
    q_TV = jnp.zeros_like(e_TV) if clipped_TV is None else jnp.where(clipped_TV, teacher.p, 0)
    d_T, b_T, mass_T = _sum_parts([_sum_row(e_TV), _sum_row(b_TV), _sum_row(q_TV)], axis)
    value_T, factor_T = clips.clip_tokens(d_T, settings)
    dz_TV = (b_TV - student.p * b_T[:, None]) * factor_T[:, None]
    if clipped_TV is None:
        mass_T = clips.clipped_mass(d_T, None, teacher, settings)
    return value_T, dz_TV, mass_T


def score(
    logits_TV: jax.Array, tokens_T: jax.Array, temperature: float, axis: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores tokens like `distributions.score`; the gradient [T, V] is this device's part."""
    factor = 1 / temperature
    x_TV = (logits_TV - _row_maxima([logits_TV], axis)[0]) * factor
    weights_TV = jnp.exp(x_TV)
    total_T, log_T, y_T = _sum_parts(
        [_sum_row(weights_TV), _sum_row(weights_TV * x_TV), _pick_here(x_TV, tokens_T, axis)], axis
    )
    log_total_T = jnp.log(total_T)
    student = _distribution(x_TV, weights_TV, total_T)
    dz_TV = _subtract_one_hot(student, tokens_T, axis) * -factor
    return y_T - log_total_T, log_total_T - log_T / total_T, dz_TV


def _row_maxima(logits: list[jax.Array], axis: str) -> list[jax.Array]:
    """Returns row maxima over the whole vocabulary, [T, 1] each, with a single exchange."""
    tops = jax.lax.pmax(jnp.stack([jnp.max(x_TV, axis=1) for x_TV in logits]), axis)
    return [top_T[:, None] for top_T in tops]


def _sum_row(x_TV: jax.Array) -> jax.Array:
    return jnp.sum(x_TV, axis=1)


def _sum_parts(sums: list[jax.Array], axis: str) -> list[jax.Array]:
    """Returns sums [T] over all parts of the vocabulary, with a single exchange."""
    return list(jax.lax.psum(jnp.stack(sums), axis))


def _pick_here(x_TV: jax.Array, tokens_T: jax.Array, axis: str) -> jax.Array:
    """Returns x[t, token], shape [T]; the result is 0 for tokens outside this device's part."""
    count = x_TV.shape[1]
    local_T = tokens_T - first_entry(axis, count)
    here_T = (local_T >= 0) & (local_T < count)
    return jnp.where(here_T, distributions.pick(x_TV, jnp.clip(local_T, 0, count - 1)), 0)


def _distribution(x_TV: jax.Array, weights_TV: jax.Array, total_T: jax.Array) -> Distribution:
    """Normalises x = (logits - top) / τ by the sum of exponentials over the whole vocabulary."""
    total_T1 = total_T[:, None]
    return Distribution(weights_TV * (1 / total_T1), x_TV - jnp.log(total_T1))


def _subtract_one_hot(student: Distribution, tokens_T: jax.Array, axis: str) -> jax.Array:
    """Returns p - 1[y] for this device's entries, shape [T, V], where y is the token."""
    count = student.p.shape[1]
    local_T1 = (tokens_T - first_entry(axis, count))[:, None]
    one_hot = jnp.arange(count, dtype=jnp.int32)[None] == local_T1
    return student.p - one_hot.astype(student.p.dtype)
