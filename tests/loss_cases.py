"""Settings of the divergence in all combinations, inputs for each, and float64 to compare with.

`FACTORS` are the settings; `cases` all combinations that are allowed, `pairs` a few of them, in
which every allowed pair of values occurs. `errors` runs one: losses, statistics and gradients
against `oracle.py`, which starts from the rounded inputs.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from copsd_jax.losses import divergence_loss, divergences
from copsd_jax.losses.pallas import block_sizes
from copsd_jax.losses.pallas import dispatch as kernels

# 23 tokens in blocks of at most 8, and 61 entries: no block divides them.
TOKENS, WIDTH, VOCABULARY, CHUNK = 23, 8, 61, 8
SMALL = block_sizes.Blocks(tokens=128, vocab=128, rows=128)
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "chunked": {},
    "pallas_tpu": {"kernel": kernels.KernelOptions(blocks=SMALL, interpret=True)},
    "pallas_gpu": {"kernel": kernels.KernelOptions(blocks=SMALL, interpret=True)},
}
FACTORS = {
    "divergence": (*divergences.DIVERGENCES, "jsd normalised", "sampled"),
    "clip": ("none", "element", "token", "token_weight", "huber"),
    "top_k": ("all", "teacher", "student", "union", "teacher tail", "student tail", "union tail"),
    # all: every row; some: 0 and NaN in the others; live: 0, with statistics; ratio: importance
    "weights": ("all", "some", "live", "ratio"),
    "temperature": (1.0, 1.3),
    "dtype": ("float32", "bfloat16"),
    # extreme: logits up to 2^14, exact in bfloat16, many of them equal; one: a single token
    "inputs": ("normal", "extreme", "one"),
    "implementation": tuple(IMPLEMENTATIONS),
}
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


class Case(dict):
    """One value of each factor."""

    def __str__(self) -> str:
        return ", ".join(map(str, self.values()))


def allowed(case: dict) -> bool:
    """What `losses` does not refuse."""
    if case["divergence"] == "sampled" and (case["clip"] != "none" or case["top_k"] != "all"):
        return False
    return case["top_k"] == "all" or not case["implementation"].startswith("pallas")


def cases() -> list[Case]:
    """All that is allowed."""
    every = (
        Case(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())
    )
    return [case for case in every if allowed(case)]


def product(implementation: str) -> list[Case]:
    """All but single tokens; those that share a program one after the other."""
    found = [
        case
        for case in cases()
        if case["implementation"] == implementation and case["inputs"] != "one"
    ]
    return sorted(found, key=lambda case: (str(settings(case)), case["dtype"], str(case)))


def pairs() -> list[Case]:
    """Each time the case with the most pairs that were not there yet, until all are."""
    every = cases()
    numbers = np.array([[FACTORS[name].index(case[name]) for name in FACTORS] for case in every])
    columns = list(itertools.combinations(range(len(FACTORS)), 2))
    ids = np.stack(
        [numbers[:, i] * 10 + numbers[:, j] + 100 * n for n, (i, j) in enumerate(columns)], axis=1
    )
    missing = np.zeros(100 * len(columns), bool)
    missing[ids] = True
    chosen = []
    while missing.any():
        best = int(np.argmax(missing[ids].sum(axis=1)))
        missing[ids[best]] = False
        chosen.append(every[best])
    return chosen


def settings(case: Case) -> divergence_loss.Divergence:
    """All but the clip's size."""
    name, _, normal = case["divergence"].partition(" ")
    whose, _, tail = case["top_k"].partition(" ")
    ratio = case["weights"] == "ratio"
    return divergence_loss.Divergence(
        name, 0.3, bool(normal), case["temperature"], 0 if whose == "all" else 5, case["clip"],
        sampling_temperature=1.2 if ratio else case["temperature"],
        top_k_of="teacher" if whose == "all" else whose, tail=bool(tail),
        ratio_clip=1.3 if ratio else 0.0, rollout_clip=1.5 if ratio else 0.0,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays as the losses get them, states and heads rounded, and their logits in float64."""

    arrays: tuple  # hidden_s, hidden_t, head_s, head_t, tokens, old, rollout
    z_s: np.ndarray
    z_t: np.ndarray
    weight_T: np.ndarray
    live_T: np.ndarray


def _normal(rng: np.random.Generator, tokens: int) -> list[np.ndarray]:
    hidden = [rng.normal(size=(tokens, WIDTH)) for _ in range(2)]
    return hidden + [rng.normal(size=(VOCABULARY, WIDTH)) * 0.5 for _ in range(2)]


def _extreme(rng: np.random.Generator, tokens: int) -> list[np.ndarray]:
    """A row's logits are 2^k (k from -2 to 13) times -2 to 2; some rows have equal sides."""
    hidden = []
    for _ in range(2):
        unit = np.eye(WIDTH)[rng.integers(0, WIDTH, tokens)]
        hidden.append(unit * 2.0 ** rng.integers(-2, 14, (tokens, 1)))
    heads = [rng.integers(-2, 3, (VOCABULARY, WIDTH)).astype(float) for _ in range(2)]
    hidden[1][::5], heads[1][:, :2] = hidden[0][::5], heads[0][:, :2]
    return hidden + heads


@functools.cache
def _inputs(kind: str, dtype: str, weights: str, sampling: float, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    tokens = 1 if kind == "one" else TOKENS
    drawn = (_extreme if kind == "extreme" else _normal)(rng, tokens)
    arrays = [np.array(jnp.asarray(x, jnp.dtype(dtype))) for x in drawn]
    z_s, z_t = (oracle.logits(arrays[i], arrays[i + 2]) for i in (0, 1))
    sampled_T = rng.integers(0, VOCABULARY, tokens).astype(np.int32)
    if weights == "ratio" and kind == "extreme":
        # Probable ones, as samples are: the ratio is the exponential of a difference of their
        # log-probabilities, which in float32 holds nothing where these are in the thousands.
        sampled_T = np.argmax(z_s, axis=1).astype(np.int32)
    now_T = oracle.log_softmax(z_s / sampling)[np.arange(tokens), sampled_T]
    old_T = (now_T + rng.normal(size=tokens) * 0.4).astype(np.float32)
    rollout_T = (old_T + rng.normal(size=tokens) * 0.4).astype(np.float32)
    weight_T = rng.uniform(0.2, 1, tokens).astype(np.float32) / np.float32(tokens)
    live_T = np.ones(tokens, bool)
    if weights in ("some", "live") and tokens > 1:
        off_T = np.arange(tokens) % 3 == 1
        off_T[-9:-1] = True  # a block without anything
        weight_T[off_T] = 0
        if weights == "some":
            live_T = ~off_T
            for x in arrays[:2]:
                x[off_T] = np.nan
    return Inputs((*arrays, sampled_T, old_T, rollout_T), z_s, z_t, weight_T, live_T)


@functools.cache
def _clip(s: divergence_loss.Divergence) -> float:
    """κ among the larger entries or tokens of the usual inputs; one for all of them, so that cases
    with one shape share a program."""
    inputs = _inputs("normal", "float32", "all", 1.0, 0)
    kept_TV = oracle.kept_set(inputs.z_s, inputs.z_t, s)
    e = oracle.entries(*oracle.sides(inputs.z_s, inputs.z_t, s, kept_TV), s)
    found = e if s.clip_mode == "element" else e.sum(axis=1)
    return round(float(np.quantile(found[found > 1e-3], 0.7)), 4)


def ready(case: Case) -> tuple[Inputs, divergence_loss.Divergence, oracle.Frozen]:
    """Inputs with no entry or token so near the clip, nor a top k so near a tie, that rounding
    could put it on the other side."""
    s = settings(case)
    if s.clip_mode != "none":
        plain = dataclasses.replace(s, ratio_clip=0.0, rollout_clip=0.0, sampling_temperature=1.0)
        s = dataclasses.replace(s, clip=_clip(plain))
    for seed in range(200):
        kind, weights = case["inputs"], case["weights"]
        inputs = _inputs(kind, case["dtype"], weights, s.sampling_temperature, seed)
        z_s, z_t, tokens_T = inputs.z_s, inputs.z_t, inputs.arrays[4]
        frozen = oracle.freeze(z_s, z_t, tokens_T, s, *map(np.float64, inputs.arrays[5:]))
        # Ties of extreme logits are exact: all forms break them alike.
        near = s if kind != "extreme" else dataclasses.replace(s, top_k=0, tail=False)
        margin = oracle.margin(z_s, z_t, near, frozen)
        if margin > (2e-5 if case["dtype"] == "float32" else 4e-3 * s.clip):
            return inputs, s, frozen
    raise AssertionError(f"no inputs with a margin: {case}")


def slope(z_s, z_t, tokens_T, s: divergence_loss.Divergence, frozen: oracle.Frozen) -> np.ndarray:
    """`oracle.slope` where p may be 0 in float64 and a tail at its floor: from p ∘ a, not from a.

    A tail at its floor is a constant: the value does not depend on it.
    """
    if s.divergence == "sampled":
        return oracle.slope(z_s, z_t, tokens_T, s, frozen)
    logp, logq = oracle.sides(z_s, z_t, s, frozen.kept_TV)
    p, q, e = np.exp(logp), np.exp(logq), oracle.entries(logp, logq, s)
    kept = ~np.isneginf(logp)
    gap = np.where(kept, logp, 0) - np.where(kept, logq, 0)
    if s.divergence == "fkl":
        pa = -q
    elif s.divergence == "rkl":
        pa = p * (gap + 1)
    else:
        scale = 1 / (s.beta * (1 - s.beta)) if s.normalize_beta else 1.0
        mix = np.logaddexp(np.log1p(-s.beta), np.log(s.beta) - gap)  # ln M - ln p
        pa = -scale * (1 - s.beta) * p * mix
    pa = np.where(kept & ~((e > s.clip) & (s.clip_mode == "element")), pa, 0)
    d = e.sum(axis=1, keepdims=True)
    factor = {
        "token": (d <= s.clip).astype(float),
        "token_weight": frozen.factor_T[:, None],
        "huber": np.minimum(d / s.clip, 1),
    }.get(s.clip_mode, np.ones_like(d))
    factor = factor * frozen.ratio_T[:, None] / s.temperature
    if not s.tail:
        return factor * (pa - p * pa.sum(axis=1, keepdims=True))
    whole = oracle.softmax(z_s / s.temperature)
    outside = np.where(frozen.kept_TV, 0, whole).sum(axis=1, keepdims=True)
    a_tail = np.where(outside > 1e-7, pa[:, -1:] / p[:, -1:], 0)
    wc = np.where(frozen.kept_TV, pa[:, :-1] - whole * a_tail, 0)
    return factor * (wc - whole * wc.sum(axis=1, keepdims=True))


def _want(
    inputs: Inputs, s: divergence_loss.Divergence, frozen: oracle.Frozen
) -> dict[str, np.ndarray]:
    z_s, z_t, tokens_T = inputs.z_s, inputs.z_t, inputs.arrays[4]
    rows, live_T = np.arange(len(tokens_T)), inputs.live_T
    weight_T = inputs.weight_T.astype(np.float64)
    value_T = oracle.value(z_s, z_t, tokens_T, s, frozen)
    weighted_TV = slope(z_s, z_t, tokens_T, s, frozen) * weight_T[:, None]
    logs = [oracle.log_softmax(z / s.temperature) for z in (z_s, z_t)]
    sampling = oracle.log_softmax(z_s / s.sampling_temperature)
    per_token = {
        "value": value_T,
        "logp student": logs[0][rows, tokens_T],
        "logp teacher": logs[1][rows, tokens_T],
        "logp sampling": sampling[rows, tokens_T],
        "entropy student": -(np.exp(logs[0]) * logs[0]).sum(axis=1),
        "entropy teacher": -(np.exp(logs[1]) * logs[1]).sum(axis=1),
        "clipped mass": oracle.clipped_mass(z_s, z_t, s, frozen),
        "ratio": frozen.ratio_T,
    }
    hidden_TD = np.where(live_T[:, None], np.float64(inputs.arrays[0]), 0)
    return {
        **{name: np.where(live_T, x_T, 0) for name, x_T in per_token.items()},
        "loss": np.array(weight_T @ value_T),
        "grad hidden": weighted_TV @ np.float64(inputs.arrays[2]),
        "grad head": weighted_TV.T @ hidden_TD,
    }


def run(implementation: str, s: divergence_loss.Divergence, arrays: tuple, weight_T, live_T):
    """((loss, stats), gradients to the states and to the head of the student)."""

    def loss(hidden_s, head_s):
        _, hidden_t, _, head_t, tokens_T, old_T, rollout_T = arrays
        return divergence_loss.divergence(
            hidden_s, hidden_t, head_s, head_t, tokens_T, weight_T, s,
            implementation=implementation, chunk=CHUNK, train_head=True, logp_old_T=old_T,
            logp_rollout_T=rollout_T, live_T=live_T, **IMPLEMENTATIONS[implementation],
        )  # fmt: skip

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays[0], arrays[2])


_jitted = jax.jit(run, static_argnums=(0, 1))


def errors(case: Case) -> dict[str, float]:
    """Of each array the largest error, in units of its largest magnitude (at least that of 1e-30).

    `loss` in units of Σ |weight · value|. A statistic is one array; the clipped mass, whose largest
    may be 0, is taken plus 1.
    """
    inputs, s, frozen = ready(case)
    args = jax.tree.map(jnp.asarray, (inputs.arrays, inputs.weight_T, inputs.live_T))
    (loss, stats), grads = _jitted(case["implementation"], s, *args)
    want = _want(inputs, s, frozen)
    got = dict(zip(want, (*stats[:8], loss, *grads), strict=True))
    for grad, x in zip(grads, (inputs.arrays[0], inputs.arrays[2]), strict=True):
        assert grad.dtype == x.dtype
    assert not np.asarray(grads[0])[inputs.weight_T == 0].any()
    out = {}
    for name, exact in want.items():
        largest = max(np.abs(exact).max(), 1e-30)
        if name == "loss":
            largest = max(np.abs(inputs.weight_T * want["value"]).sum(), 1e-30)
        if name == "clipped mass":
            largest = 1 + largest
        out[name] = float(np.abs(np.asarray(got[name], np.float64) - exact).max() / largest)
        if np.isnan(out[name]):
            out[name] = np.inf
    return out
