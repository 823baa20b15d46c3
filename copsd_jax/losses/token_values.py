"""Computes each token's value and statistics, and the gradient of the logits, in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import clips, distributions, divergences, top_k

Distribution = distributions.Distribution
Divergence = divergences.Divergence


class TokenInputs(NamedTuple):
    """Inputs of the divergence other than hidden states, [T] each; the inputs have no gradient.

    Attributes:
      tokens_T: int32 ids of the sampled tokens in the whole vocabulary.
      weight_T: factor by which each token's value is multiplied in the loss.
      logp_old_T, logp_rollout_T: arguments of `clips.clip_importance_ratio`, or None.
    """

    tokens_T: jax.Array
    weight_T: jax.Array
    logp_old_T: jax.Array | None
    logp_rollout_T: jax.Array | None


class TokenStats(NamedTuple):
    """Statistics of each token, float32 [T], without gradients; 0 for rows that are not live.

    Values, log-probabilities and entropies are in nats.

    Attributes:
      value_T: the token's loss before weighting, which is the clipped divergence times `ratio_T`.
      logp_student_T, logp_teacher_T: log-probability of the sampled token over the whole
        vocabulary, at the loss temperature.
      logp_sampling_T: log-probability of the sampled token under the student at the sampling
        temperature. A sampler with the same weights must report the same number.
      entropy_student_T, entropy_teacher_T: entropy of each side's distribution at the loss
        temperature.
      clipped_mass_T: amount of clipping, in a measure that depends on clip_mode. In the mode
        `element`, clipped_mass_T is the teacher's mass Σ q_v on the clipped entries; q is
        renormalised if top_k is used without a tail. In the modes `token`, `token_weight` and
        `huber`, clipped_mass_T is 1 if d > κ, else 0. In the mode `none`, clipped_mass_T is 0.
      ratio_T: the result of `clips.clip_importance_ratio`; 1 if both clips are off.
    """

    value_T: jax.Array
    logp_student_T: jax.Array
    logp_teacher_T: jax.Array
    logp_sampling_T: jax.Array
    entropy_student_T: jax.Array
    entropy_teacher_T: jax.Array
    clipped_mass_T: jax.Array
    ratio_T: jax.Array


def score_divergence_block(
    logits_s_TV: jax.Array,
    logits_t_TV: jax.Array,
    tokens_T: jax.Array,
    settings: Divergence,
    logp_old_T: jax.Array | None = None,
    logp_rollout_T: jax.Array | None = None,
) -> tuple[TokenStats, jax.Array]:
    """Scores a block of tokens over the whole vocabulary.

    Args:
      logits_s_TV: logits of the student, float32 or float64, not yet divided by τ.
      logits_t_TV: logits of the teacher, also not yet divided by τ.
      tokens_T: int32, the sampled tokens.
      settings: settings of the divergence.
      logp_old_T: see `clips.clip_importance_ratio`.
      logp_rollout_T: see `clips.clip_importance_ratio`.

    Returns:
      The statistics, and the gradient dz_TV = ∂value_t / ∂logits_s[t, v], [T, V], in the dtype of
      the logits.
    """
    scale = 1 / settings.temperature
    sampling_T = distributions.log_prob(logits_s_TV, tokens_T, settings.sampling_temperature)
    logits_s_TV, logits_t_TV = logits_s_TV * scale, logits_t_TV * scale
    student, teacher = distributions.softmax(logits_s_TV), distributions.softmax(logits_t_TV)
    logp_T = distributions.pick(student.log, tokens_T)
    logq_T = distributions.pick(teacher.log, tokens_T)
    if settings.divergence == "sampled":
        advantage_T = logq_T - logp_T
        value_T = -advantage_T * logp_T
        dz_TV = advantage_T[:, None] * distributions.subtract_one_hot(student, tokens_T)
        mass_T = jnp.zeros_like(value_T)
    elif settings.top_k:
        best = top_k.choose(logits_s_TV, logits_t_TV, settings)
        inside, open_T1 = top_k.restrict(logits_s_TV, student, best, settings)
        inside_t, _ = top_k.restrict(logits_t_TV, teacher, best, settings)
        value_T, dz_TK, mass_T = _compute_token_divergence(inside, inside_t, settings, open_T1)
        dz_TV = top_k.scatter_gradient(dz_TK, inside, student.p, best)
    else:
        value_T, dz_TV, mass_T = _compute_token_divergence(student, teacher, settings)
    ratio_T = clips.clip_importance_ratio(sampling_T, logp_old_T, logp_rollout_T, settings)
    stats = TokenStats(
        value_T * ratio_T, logp_T, logq_T, sampling_T,
        distributions.entropy(student), distributions.entropy(teacher), mass_T, ratio_T,
    )  # fmt: skip
    return stats, dz_TV * (scale * ratio_T)[:, None]


def _compute_token_divergence(
    student: Distribution, teacher: Distribution, settings: Divergence, open_T1=None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the value [T], the gradient [T, K], and the clipped mass [T].

    The gradient is with respect to logits / τ.
    """
    e_TK, b_TK, clipped_TK = divergences.compute_entries(student, teacher, settings)
    if open_T1 is not None:  # a tail at its floor has no gradient
        b_TK = jnp.concatenate([b_TK[:, :-1], jnp.where(open_T1, b_TK[:, -1:], 0)], axis=1)
    d_T = jnp.sum(e_TK, axis=-1)
    value_T, factor_T = clips.clip_tokens(d_T, settings)
    dz_TK = b_TK - student.p * jnp.sum(b_TK, axis=-1, keepdims=True)
    mass_T = clips.clipped_mass(d_T, clipped_TK, teacher, settings)
    return value_T, dz_TK * factor_T[:, None], mass_T
