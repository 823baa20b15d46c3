"""Computes the divergence with [tokens, vocabulary] arrays and automatic differentiation.

`dense` is the reference for the other implementations, because `dense` uses no closed form of a
gradient.
"""

import jax
import jax.numpy as jnp

from copsd_jax.losses import clips, distributions, divergences, precision, token_values, top_k

Distribution = distributions.Distribution
Divergence = divergences.Divergence


def compute_logits(hidden_TD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Returns logits [T, V], computed from operands that are rounded to the states' dtype.

    The operands are widened after rounding, because automatic differentiation of a mixed-precision
    matmul would round the gradient.
    """
    dtype = precision.sum_dtype(hidden_TD)
    wide_TD, head_VD = hidden_TD.astype(dtype), head_VD.astype(hidden_TD.dtype).astype(dtype)
    return precision.dot(wide_TD, head_VD, 1, 1)


def score_tokens(
    settings: Divergence,
    hidden: tuple[jax.Array, jax.Array],
    heads: tuple[jax.Array, jax.Array],
    inputs: token_values.TokenInputs,
) -> token_values.TokenStats:
    """Scores all tokens at once; `value_T` is differentiable in the student's states and head.

    Args:
      settings: settings of the divergence.
      hidden: states of student and teacher, [T, D] each.
      heads: heads of student and teacher, [V, D] each.
      inputs: the other inputs of each token, arrays [T].
    """
    tokens_T = inputs.tokens_T
    logits_s_TV, logits_t_TV = map(compute_logits, hidden, heads)
    student = distributions.softmax(logits_s_TV * (1 / settings.temperature))
    teacher = distributions.softmax(logits_t_TV * (1 / settings.temperature))
    sampling_T = distributions.log_prob(logits_s_TV, tokens_T, settings.sampling_temperature)
    ratio_T = clips.clip_importance_ratio(
        sampling_T, inputs.logp_old_T, inputs.logp_rollout_T, settings
    )
    value_T, mass_T = compute_values(logits_s_TV, logits_t_TV, tokens_T, settings)
    logp_T, logq_T = (distributions.pick(side.log, tokens_T) for side in (student, teacher))
    return token_values.TokenStats(
        value_T * ratio_T, logp_T, logq_T, sampling_T,
        distributions.entropy(student), distributions.entropy(teacher), mass_T, ratio_T,
    )  # fmt: skip


def compute_values(
    logits_s_TV: jax.Array, logits_t_TV: jax.Array, tokens_T: jax.Array, settings: Divergence
) -> tuple[jax.Array, jax.Array]:
    """Computes the differentiable value and the clipped mass of each token, [T] each.

    Args:
      logits_s_TV: logits of the student, not yet divided by τ.
      logits_t_TV: logits of the teacher, also not yet divided by τ.
      tokens_T: int32, the sampled tokens.
      settings: settings of the divergence.
    """
    logits_s_TV = logits_s_TV * (1 / settings.temperature)
    logits_t_TV = logits_t_TV * (1 / settings.temperature)
    student, teacher = distributions.softmax(logits_s_TV), distributions.softmax(logits_t_TV)
    if settings.divergence == "sampled":
        logp_T = distributions.pick(student.log, tokens_T)
        advantage_T = jax.lax.stop_gradient(distributions.pick(teacher.log, tokens_T) - logp_T)
        return -advantage_T * logp_T, jnp.zeros_like(logp_T)
    if settings.top_k:
        best = top_k.choose(logits_s_TV, logits_t_TV, settings)
        student, _ = top_k.restrict(logits_s_TV, student, best, settings)
        teacher, _ = top_k.restrict(logits_t_TV, teacher, best, settings)
    e_TK, clipped_TK = _differentiable_entries(student, teacher, settings)
    d_T = jnp.sum(e_TK, axis=-1)
    kappa, stop_gradient = settings.clip, jax.lax.stop_gradient
    value_T = {
        "none": lambda: d_T,
        "element": lambda: d_T,
        "token": lambda: jnp.where(d_T > kappa, kappa, d_T),
        "token_weight": lambda: d_T * stop_gradient(jnp.where(d_T > kappa, kappa / d_T, 1.0)),
        "huber": lambda: jnp.where(d_T > kappa, d_T - kappa / 2, d_T * d_T / (2 * kappa)),
    }[settings.clip_mode]()
    return value_T, clips.clipped_mass(d_T, clipped_TK, teacher, settings)


def _differentiable_entries(
    student: Distribution, teacher: Distribution, settings: Divergence
) -> tuple[jax.Array, jax.Array | None]:
    """Returns differentiable entries [T, K], and a bool array [T, K] that marks clipped entries.

    The entries have the values that `divergences.compute_entries` returns. Each entry is the sum of
    two terms. The first term is a constant that has the entry's value. The second term has the
    value 0, but its derivative is the derivative of the entry. The derivative of the shift is
    omitted, because this derivative sums to 0 over the vocabulary.
    """
    fixed = jax.lax.stop_gradient((student, teacher))
    e, _, clipped = divergences.compute_entries(*fixed, settings)
    kind = divergences.DIVERGENCES[settings.divergence]
    if kind.plain is None:
        moves = kind.entry(student, teacher, settings).e
    else:
        moves = kind.plain(student, teacher, settings)
    if clipped is not None:
        moves = jnp.where(clipped, 0, moves)
    # The divergence has its minimum where student and teacher are equal. The derivative at this
    # minimum is exactly 0, but a computed derivative would contain rounding errors.
    equal_T1 = jnp.all(student.p == teacher.p, axis=-1, keepdims=True)
    return e + jnp.where(equal_T1, 0, moves - jax.lax.stop_gradient(moves)), clipped
