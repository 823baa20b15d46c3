"""Pure functions for the policy-gradient losses of GRPO and related methods.

There are B completions of up to C tokens; the completions of one prompt form a group G. Let r be
the rewards, and let ρ = exp(ln π - ln π_old). Two formulas define the advantages A and the loss
L:

    A_i = (r_i - mean_G r) / (std_G r + ε)                      (the divisor is 1 with scale none)
    L   = Σ w · (surrogate(ρ, A) + kl_weight · kl_to(initial))  (w: compute_token_weights)

| method    | source           | scale | clip low, high | dual | w                 |
|-----------|------------------|-------|----------------|------|-------------------|
| GRPO      | arXiv 2402.03300 | std   | .2, .2         | off  | seq_mean_all      |
| Dr. GRPO  | arXiv 2503.20783 | none  | .2, .2         | off  | constant          |
| DAPO      | arXiv 2503.14476 | std   | .2, .28        | off  | global_token_mean |
| SDPO      | arXiv 2601.20802 | none  | .2, .28        | 3    | global_token_mean |

In the table, SDPO stands for the GRPO baseline of the SDPO paper, but with another w: the original
baseline averages over the tokens of each micro-batch (micro_token_mean).
"""

import jax
import jax.numpy as jnp
import numpy as np

SCALES = ("std", "none")
LOG_RATIO = 20.0  # largest magnitude of ln ρ; this bound keeps ρ and its products finite


def compute_advantages(
    rewards_B: np.ndarray, groups_B: np.ndarray, *, scale: str, eps: float = 1e-4
) -> np.ndarray:
    """Computes how much better each completion did than the mean of its group.

    The standard deviation has the divisor n - 1, as in TRL. If all rewards of a group are equal,
    the advantages are exactly 0. The advantage is also 0 if a group has only one completion. For a
    group of one completion, published code divides by NaN or uses the reward itself as the
    advantage.

    For example, with scale none, the rewards 1, 0, 0, 1 of one group give the advantages 0.5, -0.5,
    -0.5, 0.5.

    Args:
      rewards_B: finite rewards.
      groups_B: int group ids, in any order; completions of the same prompt have the same id.
      scale: `std` divides by the group's standard deviation, and `none` does not divide; the table
        in the module docstring gives the scale of each method.
      eps: number that is added to the standard deviation.

    Returns:
      The advantages, float64 [B].

    Raises:
      ValueError: the scale is unknown, the shapes disagree, or a reward is not finite.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}: the choices are {SCALES}")
    out_B = np.zeros(len(rewards_B))
    for rewards, rows in _split_policy_groups(rewards_B, groups_B):
        if _differ_in_policy_group(rewards):
            divisor = np.std(rewards, ddof=1) + eps if scale == "std" else 1.0
            out_B[rows] = (rewards - np.mean(rewards)) / divisor
    return out_B


def mark_policy_loss_completions(rewards_B: np.ndarray, groups_B: np.ndarray) -> np.ndarray:
    """Returns bool [B]: for each completion, whether the rewards in its group differ.

    If all rewards in a group are equal, all advantages in the group are 0.

    Raises:
      ValueError: the shapes disagree, or a reward is not finite.
    """
    out_B = np.zeros(len(rewards_B), bool)
    for rewards, rows in _split_policy_groups(rewards_B, groups_B):
        out_B[rows] = _differ_in_policy_group(rewards)
    return out_B


def _differ_in_policy_group(rewards: np.ndarray) -> bool:
    return bool(np.max(rewards) > np.min(rewards))


def _split_policy_groups(
    rewards_B: np.ndarray, groups_B: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (rewards, indices of the rows) for each group."""
    rewards_B, groups_B = np.asarray(rewards_B, np.float64), np.asarray(groups_B)
    if rewards_B.ndim != 1 or rewards_B.shape != groups_B.shape:
        raise ValueError(f"rewards {rewards_B.shape} and groups {groups_B.shape} must both be [B]")
    if not np.isfinite(rewards_B).all():
        raise ValueError(f"rewards_B[{int(np.argmin(np.isfinite(rewards_B)))}] is not finite")
    rows = [np.flatnonzero(groups_B == group) for group in np.unique(groups_B)]
    return [(rewards_B[at], at) for at in rows]


def compute_surrogate(
    logp_BC: jax.Array,
    logp_old_BC: jax.Array,
    advantage_BC: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[jax.Array, jax.Array]:
    """Computes the policy-gradient loss of each token, with bounds on the ratio ρ.

    The loss is -min(ρ · A, clip(ρ, 1 - clip_low, 1 + clip_high) · A). If A < 0, the dual clip
    limits the loss to at most -dual_clip · A.

    For example, ρ = 1.5, A = 1 and clip_high = .2 give the loss -1.2 and the gradient 0.

    The loss is differentiable in logp_BC; a clipped token has no gradient. Sources: PPO (arXiv
    1707.06347); GRPO, equation 3; DAPO for unequal bounds; dual-clip PPO (arXiv 1912.09729),
    equation 5.

    Args:
      logp_BC: log-probabilities of the sampled tokens under the policy that is trained.
      logp_old_BC: log-probabilities of the same tokens under the policy that sampled them. If each
        rollout is used for only one update, pass stop_gradient(logp_BC). In this case, ρ is 1, and
        the gradient is -A · ∂ ln π.
      advantage_BC: advantage of each token, in the shape of logp_BC.
      clip_low: number that is at least 0 and below 1; 0 switches the lower bound off.
      clip_high: number that is at least 0; 0 switches the upper bound off.
      dual_clip: number above 1, or 0; 0 switches the dual clip off.

    Returns:
      The loss [B, C], and a bool array [B, C] that is True where a bound replaces the ratio.

    Raises:
      ValueError: a bound is out of range.
    """
    if not (0 <= clip_low < 1 and clip_high >= 0 and (dual_clip == 0 or dual_clip > 1)):
        raise ValueError(
            f"out of range: clip_low {clip_low} (0 to below 1), clip_high {clip_high} (0 or more), "
            f"dual_clip {dual_clip} (0, or above 1)"
        )
    advantage_BC, logp_old_BC = jax.lax.stop_gradient((advantage_BC, logp_old_BC))
    log_BC = jnp.clip(logp_BC - logp_old_BC, -LOG_RATIO, LOG_RATIO)
    ratio_BC = jnp.exp(log_BC)
    bound_BC, clipped_BC = jnp.zeros_like(ratio_BC), jnp.zeros(ratio_BC.shape, bool)
    for on, hit_BC, bound in (
        (clip_high, (advantage_BC > 0) & (ratio_BC > 1 + clip_high), 1 + clip_high),
        (clip_low, (advantage_BC < 0) & (ratio_BC < 1 - clip_low), 1 - clip_low),
        (dual_clip, (advantage_BC < 0) & (ratio_BC > dual_clip), dual_clip),
    ):
        if on:
            bound_BC = jnp.where(hit_BC, bound, bound_BC)
            clipped_BC = clipped_BC | hit_BC
    return -advantage_BC * jnp.where(clipped_BC, bound_BC, ratio_BC), clipped_BC


def estimate_kl(logp_BC: jax.Array, logp_ref_BC: jax.Array) -> jax.Array:
    """Estimates KL(policy ‖ reference) at each sampled token, [B, C], with GRPO's equation 4 (k3).

    The estimate is e^x - x - 1, where x = ln π_ref - ln π of the token. The estimate is never
    negative. If the tokens were drawn from the policy, the estimate is unbiased. The estimate is
    differentiable in logp_BC.
    """
    x_BC = jax.lax.stop_gradient(logp_ref_BC) - logp_BC
    return jnp.expm1(x_BC) - x_BC
