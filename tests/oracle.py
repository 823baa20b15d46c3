"""The losses once more, in float64 NumPy, straight from the formulas and with no shortcuts.

`value` follows the definitions (sums of q ln(q/p) and so on), `slope` the published gradient
p ∘ (a - E_p[a]) / τ with a = ∂e/∂p, and `difference` central finite differences of `value`. What
the loss treats as a constant (top-k indices, the weight of token_weight, the advantage of sampled)
is computed once by `freeze` and handed in, so that finite differences do not move it.
"""

import dataclasses

import numpy as np

KINK_MARGIN = 2e-5


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Constants of one evaluation point: indices [T, K], token factor [T], advantage [T]."""

    best_TK: np.ndarray
    factor_T: np.ndarray
    advantage_T: np.ndarray


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
    """e_v before any clip."""
    p, q = np.exp(logp), np.exp(logq)
    if s.divergence == "fkl":
        return q * (logq - logp)
    if s.divergence == "rkl":
        return p * (logp - logq)
    mix = mixture(logp, logq, s.beta)
    e = s.beta * q * (logq - mix) + (1 - s.beta) * p * (logp - mix)
    return e / (s.beta * (1 - s.beta)) if s.normalize_beta else e


def _renormalised(z_s, z_t, s, best_TK):
    z_s, z_t = (np.take_along_axis(z / s.temperature, best_TK, axis=1) for z in (z_s, z_t))
    return log_softmax(z_s), log_softmax(z_t)


def freeze(z_s: np.ndarray, z_t: np.ndarray, tokens_T: np.ndarray, s) -> Frozen:
    k = s.top_k or z_t.shape[1]
    best_TK = np.argsort(-z_t, axis=1, kind="stable")[:, :k]
    d_T = np.zeros(len(z_s))
    if s.divergence != "sampled":
        d_T = entries(*_renormalised(z_s, z_t, s, best_TK), s).sum(axis=1)
    rows = np.arange(len(tokens_T))
    advantage_T = (log_softmax(z_t / s.temperature) - log_softmax(z_s / s.temperature))[
        rows, tokens_T
    ]
    with np.errstate(divide="ignore"):
        factor_T = np.where(d_T > s.clip, s.clip / d_T, 1.0)
    return Frozen(best_TK, factor_T, advantage_T)


def value(z_s: np.ndarray, z_t: np.ndarray, tokens_T: np.ndarray, s, frozen: Frozen) -> np.ndarray:
    """The value of every token, [T], from logits not yet divided by the temperature."""
    if s.divergence == "sampled":
        logp_TV = log_softmax(z_s / s.temperature)
        return -frozen.advantage_T * logp_TV[np.arange(len(tokens_T)), tokens_T]
    e = entries(*_renormalised(z_s, z_t, s, frozen.best_TK), s)
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
        order = -np.sort(-z_t, axis=1)
        gap = (order[:, s.top_k - 1] - order[:, s.top_k]).min()
    if s.divergence == "sampled" or s.clip_mode == "none":
        return float(gap)
    e = entries(*_renormalised(z_s, z_t, s, frozen.best_TK), s)
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
    """∂value_t / ∂z_s[t, v] by the formula p ∘ (a - E_p[a]) / τ, [T, V]."""
    if s.divergence == "sampled":
        p = softmax(z_s / s.temperature)
        onehot = np.eye(z_s.shape[1])[tokens_T]
        return frozen.advantage_T[:, None] * (p - onehot) / s.temperature
    logp, logq = _renormalised(z_s, z_t, s, frozen.best_TK)
    p, q = np.exp(logp), np.exp(logq)
    if s.divergence == "fkl":
        a = -q / p
    elif s.divergence == "rkl":
        a = logp - logq + 1
    else:
        scale = 1 / (s.beta * (1 - s.beta)) if s.normalize_beta else 1.0
        a = scale * (1 - s.beta) * (logp - mixture(logp, logq, s.beta))
    e = entries(logp, logq, s)
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
    inside = factor * p * (a - (p * a).sum(axis=1, keepdims=True)) / s.temperature
    out = np.zeros_like(z_s)
    np.put_along_axis(out, frozen.best_TK, inside, axis=1)
    return out


def clipped_mass(z_s, z_t, s, frozen: Frozen) -> np.ndarray:
    """Teacher's mass on clipped entries, or 1 for a clipped token, [T]."""
    if s.divergence == "sampled" or s.clip_mode == "none":
        return np.zeros(len(z_s))
    logp, logq = _renormalised(z_s, z_t, s, frozen.best_TK)
    e = entries(logp, logq, s)
    if s.clip_mode == "element":
        return (np.exp(logq) * (e > s.clip)).sum(axis=1)
    return (e.sum(axis=1) > s.clip).astype(float)


def weights(mask_BC: np.ndarray, norm: str, micro_batch: int) -> np.ndarray:
    """The three normalisers as nested loops over what a step adds up."""
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
                out[b, c] = {
                    "micro_token_mean": 1 / inside / len(micros),
                    "global_token_mean": 1 / mask_BC.sum(),
                    "seq_mean": 1 / mask_BC[b].sum() / max(alive, 1),
                }[norm]
    return out
