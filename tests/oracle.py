"""The losses once more, in float64 NumPy, straight from the formulas and with no shortcuts.

`value` follows the definitions (sums of q ln(q/p) and so on), `slope` the published gradient
p ∘ (a - E_p[a]) / τ with a = ∂e/∂p, and `difference` central finite differences of `value`. What
the loss treats as a constant (top-k sets, the weight of token_weight, the advantage of sampled, the
importance ratio) is computed once by `freeze` and handed in, so that finite differences do not
move it. `sdpo` is that paper's loss as a whole, without any of the functions above it.
"""

import dataclasses

import numpy as np

KINK_MARGIN = 2e-5


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Constants of one evaluation point: the kept set, each token's factor, advantage, ratio."""

    kept_TV: np.ndarray
    factor_T: np.ndarray
    advantage_T: np.ndarray
    ratio_T: np.ndarray


def softmax(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z - z.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)


def logits(hidden_TD: np.ndarray, head_VD: np.ndarray) -> np.ndarray:
    return np.asarray(hidden_TD, np.float64) @ np.asarray(head_VD, np.float64).T


def mixture(logp: np.ndarray, logq: np.ndarray, beta: float) -> np.ndarray:
    return np.logaddexp(logp + np.log1p(-beta), logq + np.log(beta))


def entries(logp: np.ndarray, logq: np.ndarray, s) -> np.ndarray:
    """e_v before any clip; 0 where neither side has an entry (log -inf on both)."""
    with np.errstate(invalid="ignore"):
        p, q = np.exp(logp), np.exp(logq)
        if s.divergence == "fkl":
            e = q * (logq - logp)
        elif s.divergence == "rkl":
            e = p * (logp - logq)
        else:
            assert s.divergence == "jsd", (
                f"oracle.py lacks {s.divergence}: extend entries and slope"
            )
            mix = mixture(logp, logq, s.beta)
            e = s.beta * q * (logq - mix) + (1 - s.beta) * p * (logp - mix)
            e = e / (s.beta * (1 - s.beta)) if s.normalize_beta else e
    return np.where(np.isneginf(logp) & np.isneginf(logq), 0, e)


def kept_set(z_s: np.ndarray, z_t: np.ndarray, s) -> np.ndarray:
    """bool [T, V]: whose k best, token by token."""
    out = np.zeros(z_s.shape, bool)
    whose = {"teacher": [z_t], "student": [z_s], "union": [z_s, z_t]}[s.top_k_of]
    for t in range(len(z_s)):
        for z in whose:
            out[t, np.argsort(-z[t], kind="stable")[: s.top_k or z.shape[1]]] = True
    return out


def _few(z, s, kept_TV):
    """Logarithms of the distribution that the loss sees: [T, V], or [T, V + 1] with the tail."""
    if not s.tail:
        return log_softmax(np.where(kept_TV, z / s.temperature, -np.inf))
    logp = log_softmax(z / s.temperature)
    inside = np.logaddexp.reduce(np.where(kept_TV, logp, -np.inf), axis=1, keepdims=True)
    tail = np.log(-np.expm1(np.minimum(inside, -1e-7)))
    return np.concatenate([np.where(kept_TV, logp, -np.inf), tail], axis=1)


def sides(z_s, z_t, s, kept_TV):
    """ln p and ln q of the entries that the loss sees."""
    return _few(z_s, s, kept_TV), _few(z_t, s, kept_TV)


def ratio(z_s, tokens_T, s, old_T=None, rollout_T=None) -> np.ndarray:
    """The detached importance factor, token by token."""
    now_T = log_softmax(z_s / s.sampling_temperature)[np.arange(len(tokens_T)), tokens_T]
    out = []
    for t, now in enumerate(now_T):
        old = now if old_T is None else old_T[t]
        first = min(np.exp(np.clip(now - old, -20, 20)), s.ratio_clip) if s.ratio_clip else 1.0
        second = min(np.exp(old - rollout_T[t]), s.rollout_clip) if s.rollout_clip else 1.0
        out.append(first * second)
    return np.array(out)


def freeze(z_s, z_t, tokens_T, s, old_T=None, rollout_T=None) -> Frozen:
    kept_TV = kept_set(z_s, z_t, s)
    d_T = np.zeros(len(z_s))
    if s.divergence != "sampled":
        d_T = entries(*sides(z_s, z_t, s, kept_TV), s).sum(axis=1)
    rows = np.arange(len(tokens_T))
    advantage_T = (log_softmax(z_t / s.temperature) - log_softmax(z_s / s.temperature))[
        rows, tokens_T
    ]
    with np.errstate(divide="ignore"):
        factor_T = np.where(d_T > s.clip, s.clip / d_T, 1.0)
    return Frozen(kept_TV, factor_T, advantage_T, ratio(z_s, tokens_T, s, old_T, rollout_T))


def value(z_s: np.ndarray, z_t: np.ndarray, tokens_T: np.ndarray, s, frozen: Frozen) -> np.ndarray:
    """The value of every token, [T], from logits not yet divided by the temperature."""
    return frozen.ratio_T * _plain_value(z_s, z_t, tokens_T, s, frozen)


def _plain_value(z_s, z_t, tokens_T, s, frozen):
    if s.divergence == "sampled":
        logp_TV = log_softmax(z_s / s.temperature)
        return -frozen.advantage_T * logp_TV[np.arange(len(tokens_T)), tokens_T]
    e = entries(*sides(z_s, z_t, s, frozen.kept_TV), s)
    if s.clip_mode == "element":
        return np.minimum(e, s.clip).sum(axis=1)
    d = e.sum(axis=1)
    if s.clip_mode == "token":
        return np.minimum(d, s.clip)
    if s.clip_mode == "token_weight":
        return d * frozen.factor_T
    if s.clip_mode == "huber":
        return np.where(d <= s.clip, d**2 / (2 * s.clip), d - s.clip / 2)
    return d


def margin(z_s: np.ndarray, z_t: np.ndarray, s, frozen: Frozen) -> float:
    """Distance of the nearest entry or token from the kink at κ, and of the top-k from a tie."""
    gap = np.inf
    if s.top_k and s.top_k < z_t.shape[1]:
        for z in (z_s, z_t):
            order = -np.sort(-z, axis=1)
            gap = min(gap, (order[:, s.top_k - 1] - order[:, s.top_k]).min())
    if s.divergence == "sampled" or s.clip_mode == "none":
        return float(gap)
    e = entries(*sides(z_s, z_t, s, frozen.kept_TV), s)
    at = e if s.clip_mode == "element" else e.sum(axis=1)
    return float(min(gap, np.abs(at - s.clip).min()))


def difference(z_s, z_t, tokens_T, s, frozen: Frozen, step: float = 1e-5) -> np.ndarray:
    """∂value_t / ∂z_s[t, v] by central differences, [T, V]."""
    grad = np.zeros_like(z_s)
    for v in range(z_s.shape[1]):
        up, down = z_s.copy(), z_s.copy()
        up[:, v] += step
        down[:, v] -= step
        ends = [value(z, z_t, tokens_T, s, frozen) for z in (up, down)]
        grad[:, v] = (ends[0] - ends[1]) / (2 * step)
    return grad


def slope(z_s, z_t, tokens_T, s, frozen: Frozen) -> np.ndarray:
    """∂value_t / ∂z_s[t, v] by the formula p ∘ (a - E_p[a]) / τ, [T, V].

    With a tail, by the chain rule through p_v of the kept entries and 1 - Σ p_v.
    """
    if s.divergence == "sampled":
        p = softmax(z_s / s.temperature)
        onehot = np.eye(z_s.shape[1])[tokens_T]
        scale_T = frozen.ratio_T * frozen.advantage_T / s.temperature
        return scale_T[:, None] * (p - onehot)
    logp, logq = sides(z_s, z_t, s, frozen.kept_TV)
    p, q = np.exp(logp), np.exp(logq)
    e = entries(logp, logq, s)
    with np.errstate(invalid="ignore"):
        if s.divergence == "fkl":
            a = -q / p
        elif s.divergence == "rkl":
            a = logp - logq + 1
        else:
            assert s.divergence == "jsd", (
                f"oracle.py lacks {s.divergence}: extend entries and slope"
            )
            scale = 1 / (s.beta * (1 - s.beta)) if s.normalize_beta else 1.0
            a = scale * (1 - s.beta) * (logp - mixture(logp, logq, s.beta))
    a = np.where(np.isneginf(logp), 0, a)
    d = e.sum(axis=1, keepdims=True)
    factor = np.ones_like(d)
    if s.clip_mode == "element":
        a = np.where(e > s.clip, 0.0, a)
    elif s.clip_mode == "token":
        factor = (d <= s.clip).astype(float)
    elif s.clip_mode == "token_weight":
        factor = frozen.factor_T[:, None]
    elif s.clip_mode == "huber":
        factor = np.minimum(d / s.clip, 1.0)
    factor = factor * frozen.ratio_T[:, None] / s.temperature
    if not s.tail:
        return factor * p * (a - (p * a).sum(axis=1, keepdims=True))
    # ∂value/∂p_v = a_v - a_tail for a kept v (the tail loses what v gains), then the softmax's own
    whole = softmax(z_s / s.temperature)
    c = np.where(frozen.kept_TV, a[:, :-1] - a[:, -1:], 0)
    return factor * whole * (c - (whole * c).sum(axis=1, keepdims=True))


def clipped_mass(z_s, z_t, s, frozen: Frozen) -> np.ndarray:
    """Teacher's mass on clipped entries, or 1 for a clipped token, [T]."""
    if s.divergence == "sampled" or s.clip_mode == "none":
        return np.zeros(len(z_s))
    logp, logq = sides(z_s, z_t, s, frozen.kept_TV)
    e = entries(logp, logq, s)
    if s.clip_mode == "element":
        return (np.exp(logq) * (e > s.clip)).sum(axis=1)
    return (e.sum(axis=1) > s.clip).astype(float)


def sdpo(z_s_BCV, z_t_BCV, tokens_BC, mask_BC, old_BC, rollout_BC, *, alpha, k, add_tail=True):
    """SDPO's loss of one step as published: micro-batches of one, is_clip and rollout clip 2."""
    total = 0.0
    for b in range(len(mask_BC)):
        summed = 0.0
        for c in np.flatnonzero(mask_BC[b]):
            student, teacher = log_softmax(z_s_BCV[b, c]), log_softmax(z_t_BCV[b, c])
            best = np.argsort(-student, kind="stable")[:k]
            s, q = student[best], teacher[best]
            if add_tail:
                s, q = (
                    np.append(x, np.log(-np.expm1(min(np.logaddexp.reduce(x), -1e-7))))
                    for x in (s, q)
                )
            else:
                s, q = s - np.logaddexp.reduce(s), q - np.logaddexp.reduce(q)
            if alpha == 0:
                d = np.sum(np.exp(q) * (q - s))
            elif alpha == 1:
                d = np.sum(np.exp(s) * (s - q))
            else:
                m = np.log((1 - alpha) * np.exp(s) + alpha * np.exp(q))
                d = alpha * np.sum(np.exp(q) * (q - m)) + (1 - alpha) * np.sum(np.exp(s) * (s - m))
            now = student[tokens_BC[b, c]]
            d *= min(np.exp(np.clip(now - old_BC[b, c], -20, 20)), 2)
            d *= min(np.exp(old_BC[b, c] - rollout_BC[b, c]), 2)
            summed += d
        total += summed / max(1, mask_BC[b].sum())
    return total / len(mask_BC)


def policy_loss(logp, logp_old, advantage, *, clip_low, clip_high, dual_clip):
    """One token of the clipped surrogate, as PPO and dual-clip PPO print it (0: without)."""
    rho = np.exp(logp - logp_old)
    low = 1 - clip_low if clip_low else 0.0
    high = 1 + clip_high if clip_high else np.inf
    objective = min(rho * advantage, min(max(rho, low), high) * advantage) if advantage else 0.0
    if dual_clip and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def weights(mask_BC: np.ndarray, norm: str, micro_batch: int, length: int = 0) -> np.ndarray:
    """The normalisers as nested loops over what a step adds up."""
    rows, columns = mask_BC.shape
    out = np.zeros((rows, columns))
    micros = [range(i, i + micro_batch) for i in range(0, rows, micro_batch)]
    alive = sum(1 for row in mask_BC if row.sum())
    for micro in micros:
        inside = sum(mask_BC[b].sum() for b in micro)
        for b in micro:
            for c in range(columns):
                if not mask_BC[b, c]:
                    continue
                own = mask_BC[b].sum()
                out[b, c] = (
                    1
                    / {
                        "micro_token_mean": inside * len(micros),
                        "global_token_mean": mask_BC.sum(),
                        "seq_mean": own * alive,
                        "seq_mean_all": own * rows,
                        "constant": rows * length,
                    }[norm]
                )
    return out
