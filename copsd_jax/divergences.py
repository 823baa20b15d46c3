"""Divergences between two next-token distributions, entry by entry, in closed form.

Notation (T tokens, V vocabulary, K entries that the loss sees: V, or the teacher's top k):
p the student's and q the teacher's distribution after division of the logits by the loss
temperature τ, M = (1 - β) p + β q. Every divergence is a sum over entries e_v; with
b_v = ∂e_v / ∂ln p_v = p_v ∂e_v / ∂p_v the gradient to the student's logits is

    dz = (b - p Σb) / τ.

Adding a multiple of p to b leaves dz as it is (Σp = 1), and adding the same multiple of p - q to e
leaves Σe. Both are shifted here so that b_v = 0 and e_v = 0 wherever p_v = q_v: equal sides give
exactly zero, also in float32, where Σp is only nearly 1. Nothing is divided by p or q.

The functions work on blocks of log-probabilities of any size and contain no matmul, so that a
kernel over tiles of the vocabulary can call them. Their counterpart in plain formulas is
`tests/oracle.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

CLIP_MODES = ("none", "element", "token", "token_weight", "huber")


@dataclasses.dataclass(frozen=True)
class Divergence:
    """What is compared and how; the meaning of each field is in `config.py` (`loss.*`).

    Attributes:
      divergence: fkl Σ q ln(q/p); rkl Σ p ln(p/q); jsd β KL(q‖M) + (1 - β) KL(p‖M); sampled
        -A ln p(y) with A = stop_gradient(ln q(y) - ln p(y)), y the sampled token.
      beta: of jsd, strictly between 0 and 1.
      normalize_beta: jsd divided by β (1 - β), before the clip; its limits are then fkl and rkl.
      temperature: τ > 0; both sides' logits are divided by it, no τ² anywhere.
      top_k: only the teacher's k best entries, both sides renormalised on them; 0 for all.
      clip_mode: element min(e_v, κ) for every entry; with d = Σ e_v: token min(d, κ);
        token_weight d stop_gradient(min(1, κ/d)); huber d²/(2κ) up to κ, then d - κ/2.
      clip: κ > 0.
      sampling_temperature: > 0, of `TokenStats.logp_sampling_T`; no part of the loss.
    """

    divergence: str = "fkl"
    beta: float = 0.5
    normalize_beta: bool = False
    temperature: float = 1.0
    top_k: int = 0
    clip_mode: str = "none"
    clip: float = 0.05
    sampling_temperature: float = 1.0

    def __post_init__(self) -> None:
        known = (*ENTRIES, "sampled")
        if self.divergence not in known:
            raise ValueError(f"divergence is {self.divergence!r}: the choices are {known}")
        if self.clip_mode not in CLIP_MODES:
            raise ValueError(f"clip_mode is {self.clip_mode!r}: the choices are {CLIP_MODES}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta is {self.beta}: it must lie between 0 and 1")
        if not self.sampling_temperature > 0:
            raise ValueError(f"sampling_temperature is {self.sampling_temperature}: it is above 0")
        if not (self.temperature > 0 and self.clip > 0 and self.top_k >= 0):
            raise ValueError(f"temperature and clip must be above 0, top_k at least 0: {self}")
        if self.divergence == "sampled" and (self.top_k or self.clip_mode != "none"):
            raise ValueError(f"the sampled divergence takes top_k 0 and clip_mode none: {self}")


class TokenStats(NamedTuple):
    """Per token, float32, no gradient, in nats; 0 where the token's weight is 0.

    Attributes:
      value_T: what the loss sums: the divergence, clipped.
      logp_student_T, logp_teacher_T: of the sampled token, at the loss temperature, whole
        vocabulary.
      logp_sampling_T: of the sampled token under the student at the sampling temperature: what a
        sampler of the same weights must have found.
      entropy_student_T, entropy_teacher_T: of the distributions at the loss temperature.
      clipped_mass_T: element: teacher's mass Σ q_v on the clipped entries (q renormalised under
        top_k). token, token_weight, huber: 1 where d > κ, else 0. none: 0.
    """

    value_T: jax.Array
    logp_student_T: jax.Array
    logp_teacher_T: jax.Array
    logp_sampling_T: jax.Array
    entropy_student_T: jax.Array
    entropy_teacher_T: jax.Array
    clipped_mass_T: jax.Array


class Side(NamedTuple):
    """One distribution over a block's entries: probabilities and their logarithms, one shape.

    Both are kept: the logarithm is exact where the probability has underflowed, and the
    exponential is the dear part.
    """

    p: jax.Array
    log: jax.Array


class Entry(NamedTuple):
    """Terms of the sum over the vocabulary, before clip and shift, and their derivative.

    Attributes:
      e: the entry e_v.
      b: ∂e_v / ∂ln p_v + shift · p_v.
      shift: the multiple of p that makes b vanish at p_v = q_v.
    """

    e: jax.Array
    b: jax.Array
    shift: float


def _fkl(student: Side, teacher: Side, settings: Divergence) -> Entry:
    del settings
    return Entry(teacher.p * (teacher.log - student.log), student.p - teacher.p, 1.0)


def _rkl(student: Side, teacher: Side, settings: Divergence) -> Entry:
    del settings
    e = student.p * (student.log - teacher.log)
    return Entry(e, e, -1.0)


def _jsd(student: Side, teacher: Side, settings: Divergence) -> Entry:
    """ln M is taken relative to the larger side: no overflow, and exactly ln p where p = q."""
    beta = settings.beta
    scale = 1 / (beta * (1 - beta)) if settings.normalize_beta else 1.0
    delta = teacher.log - student.log
    smaller = jnp.where(delta > 0, 1 - beta, beta)  # the smaller side's weight in M
    larger = jnp.maximum(jnp.maximum(student.p, teacher.p), jnp.finfo(jnp.float32).tiny)
    # ln M - max(ln p, ln q) = ln(1 - w (1 - min/max))
    log_mix = jnp.log1p(-smaller * (jnp.abs(teacher.p - student.p) / larger))
    p_part = student.p * (jnp.minimum(-delta, 0) - log_mix) * ((1 - beta) * scale)
    q_part = teacher.p * (jnp.minimum(delta, 0) - log_mix) * (beta * scale)
    return Entry(q_part + p_part, p_part, 0.0)


ENTRIES: dict[str, Callable[[Side, Side, Divergence], Entry]] = {
    "fkl": _fkl,
    "rkl": _rkl,
    "jsd": _jsd,
}


def entries(
    student: Side, teacher: Side, settings: Divergence
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """e, b and which entries are clipped, for sides of one shape.

    Sums over the vocabulary of e and b are the token's divergence and the Σb of `dz`.

    Returns:
      e: float32, shifted, after the clip of mode element.
      b: float32, shifted, with ∂e_v/∂ln p_v = 0 at clipped entries.
      clipped: bool; None unless the mode is element.
    """
    entry = ENTRIES[settings.divergence](student, teacher, settings)
    e, b, clipped = entry.e, entry.b, None
    if settings.clip_mode == "element":
        clipped = e > settings.clip
        e = jnp.where(clipped, settings.clip, e)
        b = jnp.where(clipped, entry.shift * student.p, b)
    if entry.shift:
        e = e + entry.shift * (student.p - teacher.p)
    return e, b, clipped


def token_clip(d_T: jax.Array, settings: Divergence) -> tuple[jax.Array, jax.Array]:
    """The token's value and ∂value/∂d, for d = Σ e of shape [T] or any other."""
    kappa = settings.clip
    if settings.clip_mode == "token":
        return jnp.minimum(d_T, kappa), (d_T <= kappa).astype(d_T.dtype)
    if settings.clip_mode == "token_weight":
        factor = kappa / jnp.maximum(d_T, kappa)
        return d_T * factor, factor
    if settings.clip_mode == "huber":
        inside = jnp.minimum(d_T, kappa)
        return inside * inside / (2 * kappa) + (d_T - inside), inside / kappa
    return d_T, jnp.ones_like(d_T)


def side(logits: jax.Array) -> Side:
    """Softmax over the last axis; one expression for both sides, so equal rows stay equal."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return Side(weights * (1 / total), logits - (top + jnp.log(total)))


def pick(x_TV: jax.Array, tokens_T: jax.Array) -> jax.Array:
    """x_TV[t, tokens_T[t]], [T]."""
    return jnp.take_along_axis(x_TV, tokens_T[:, None], axis=1)[:, 0]


def entropy(distribution: Side) -> jax.Array:
    """-Σ p ln p over the last axis."""
    return -jnp.sum(distribution.p * distribution.log, axis=-1)


def block(
    logits_s_TV: jax.Array, logits_t_TV: jax.Array, tokens_T: jax.Array, settings: Divergence
) -> tuple[TokenStats, jax.Array]:
    """Statistics of a block of tokens and the gradient of each token's value.

    Args:
      logits_s_TV, logits_t_TV: float32, student and teacher, not yet divided by τ.
      tokens_T: int32, the sampled tokens.

    Returns:
      The statistics, and dz_TV: float32, ∂value_t / ∂logits_s[t, v].
    """
    scale = 1 / settings.temperature
    sampling_T = log_prob(logits_s_TV, tokens_T, settings.sampling_temperature)
    logits_s_TV, logits_t_TV = logits_s_TV * scale, logits_t_TV * scale
    student, teacher = side(logits_s_TV), side(logits_t_TV)
    logp_T, logq_T = pick(student.log, tokens_T), pick(teacher.log, tokens_T)
    if settings.divergence == "sampled":
        value_T, dz_TV = _sampled(student, logp_T, logq_T, tokens_T)
        mass_T = jnp.zeros_like(value_T)
    elif settings.top_k:
        best_TK = jax.lax.top_k(logits_t_TV, settings.top_k)[1]
        value_T, dz_TK, mass_T = _divergence(
            side(jnp.take_along_axis(logits_s_TV, best_TK, axis=1)),
            side(jnp.take_along_axis(logits_t_TV, best_TK, axis=1)),
            settings,
        )
        row_T1 = jnp.arange(tokens_T.shape[0])[:, None]
        dz_TV = jnp.zeros_like(logits_s_TV).at[row_T1, best_TK].set(dz_TK, unique_indices=True)
    else:
        value_T, dz_TV, mass_T = _divergence(student, teacher, settings)
    stats = TokenStats(
        value_T, logp_T, logq_T, sampling_T, entropy(student), entropy(teacher), mass_T
    )
    return stats, dz_TV * scale


def log_prob(logits_TV: jax.Array, tokens_T: jax.Array, temperature: float) -> jax.Array:
    """ln softmax(logits / temperature)[token], [T]."""
    tempered_TV = logits_TV * (1 / temperature)
    return pick(tempered_TV, tokens_T) - jax.nn.logsumexp(tempered_TV, axis=-1)


def _divergence(
    student: Side, teacher: Side, settings: Divergence
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Value [T], its gradient to the tempered logits [T, K], clipped mass [T]."""
    e_TK, b_TK, clipped_TK = entries(student, teacher, settings)
    d_T = jnp.sum(e_TK, axis=-1)
    value_T, factor_T = token_clip(d_T, settings)
    dz_TK = b_TK - student.p * jnp.sum(b_TK, axis=-1, keepdims=True)
    return value_T, dz_TK * factor_T[:, None], clipped_mass(d_T, clipped_TK, teacher, settings)


def clipped_mass(
    d_T: jax.Array, clipped_TK: jax.Array | None, teacher: Side, settings: Divergence
) -> jax.Array:
    """`TokenStats.clipped_mass_T`, from the divergence before a clip of whole tokens."""
    if clipped_TK is not None:
        return jnp.sum(jnp.where(clipped_TK, teacher.p, 0), axis=-1)
    if settings.clip_mode == "none":
        return jnp.zeros_like(d_T)
    return (d_T > settings.clip).astype(d_T.dtype)


def _sampled(
    student: Side, logp_T: jax.Array, logq_T: jax.Array, tokens_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """-A ln p(y) and its gradient A (p - 1[y]) to the tempered logits."""
    advantage_T = logq_T - logp_T
    vocabulary_1V = jnp.arange(student.p.shape[1], dtype=tokens_T.dtype)[None]
    hit_TV = vocabulary_1V == tokens_T[:, None]
    dz_TV = advantage_T[:, None] * jnp.where(hit_TV, student.p - 1, student.p)
    return -advantage_T * logp_T, dz_TV
