"""Computes the clip of each token's divergence, and the importance ratio of each token."""

import jax
import jax.numpy as jnp

from copsd_jax.losses import distributions, divergences

LOG_RATIO = 20.0  # largest magnitude of ln(importance ratio), as in published code


def clip_tokens(
    divergence_T: jax.Array, settings: divergences.Divergence
) -> tuple[jax.Array, jax.Array]:
    """Clips the divergence d of each token, unless clip_mode is none or element.

    Returns:
      The clipped value and ∂value/∂d, both in the shape of divergence_T.
    """
    d_T, kappa = divergence_T, settings.clip
    if settings.clip_mode == "token":
        return jnp.minimum(d_T, kappa), (d_T <= kappa).astype(d_T.dtype)
    if settings.clip_mode == "token_weight":
        factor = kappa / jnp.maximum(d_T, kappa)
        return d_T * factor, factor
    if settings.clip_mode == "huber":
        inside = jnp.minimum(d_T, kappa)
        return inside * inside / (2 * kappa) + (d_T - inside), inside / kappa
    return d_T, jnp.ones_like(d_T)


def clipped_mass(
    divergence_T: jax.Array,
    clipped_TK: jax.Array | None,
    teacher: distributions.Distribution,
    settings: divergences.Divergence,
) -> jax.Array:
    """Returns `TokenStats.clipped_mass_T`, shape [T].

    Args:
      divergence_T: divergence of each token, before `clip_tokens` clips it.
      clipped_TK: bool, True for clipped entries if clip_mode is element; None in all other modes.
      teacher: the teacher's distribution [T, K]; read only if clip_mode is element.
      settings: settings of the divergence.
    """
    if clipped_TK is not None:
        return jnp.sum(jnp.where(clipped_TK, teacher.p, 0), axis=-1)
    if settings.clip_mode == "none":
        return jnp.zeros_like(divergence_T)
    return (divergence_T > settings.clip).astype(divergence_T.dtype)


def clip_importance_ratio(
    logp_T: jax.Array,
    logp_old_T: jax.Array | None,
    logp_rollout_T: jax.Array | None,
    settings: divergences.Divergence,
) -> jax.Array:
    """Returns min(exp(s - old), ratio_clip) · min(exp(old - rollout), rollout_clip), shape [T].

    The result has no gradient. If ratio_clip is 0, the first factor is 1. If rollout_clip is 0, the
    second factor is 1. The first factor is from SDPO (arXiv 2601.20802). The second factor is
    truncated importance sampling, which corrects for the difference between the log-probabilities
    of trainer and sampler.

    Args:
      logp_T: the student's log-probabilities s of the sampled tokens, at the sampling temperature.
      logp_old_T: log-probabilities of the same tokens under the policy that drew the rollouts; None
        means that logp_T is used instead.
      logp_rollout_T: log-probabilities that the sampler reported; needed if rollout_clip is on.
      settings: settings of the divergence, including ratio_clip and rollout_clip.

    Raises:
      ValueError: rollout_clip is on and logp_rollout_T is None.
    """
    logp_T = jax.lax.stop_gradient(logp_T)
    logp_old_T = logp_T if logp_old_T is None else logp_old_T
    ratio_T = jnp.ones_like(logp_T)
    if settings.ratio_clip:
        log_T = jnp.clip(logp_T - logp_old_T, -LOG_RATIO, LOG_RATIO)
        ratio_T = ratio_T * jnp.minimum(jnp.exp(log_T), settings.ratio_clip)
    if settings.rollout_clip:
        if logp_rollout_T is None:
            raise ValueError(f"rollout_clip is {settings.rollout_clip}: it needs logp_rollout_T")
        ratio_T = ratio_T * jnp.minimum(jnp.exp(logp_old_T - logp_rollout_T), settings.rollout_clip)
    return ratio_T
