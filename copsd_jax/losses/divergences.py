"""Divergences between two next-token distributions, entry by entry, in closed form.

Notation (T tokens, V vocabulary, K entries that the loss sees: V, or some top k and their tail):
p the student's and q the teacher's distribution after division of the logits by the loss
temperature τ, M = (1 - β) p + β q. Every divergence is a sum over entries e_v; with
b_v = ∂e_v / ∂ln p_v = p_v ∂e_v / ∂p_v the gradient to the student's logits is

    dz = (b - p Σb) / τ.

Adding a multiple of p to b leaves dz as it is (Σp = 1), and adding the same multiple of p - q to e
leaves Σe. Both are shifted here so that b_v = 0 and e_v = 0 wherever p_v = q_v: equal sides give
exactly zero, also in float32, where Σp is only nearly 1. Nothing is divided by p or q.

With `tail`, the ids outside the kept set N share one more entry of probability r = 1 - Σ_N p. An id
u outside N then has dz_u = (p_u / r) dz_tail, the part of the tail's gradient that is its own.

The functions work on blocks of log-probabilities of any size and contain no matmul, so that a
kernel over tiles of the vocabulary can call them. Their counterpart in plain formulas is
`tests/oracle.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

CLIP_MODES = ("none", "element", "token", "token_weight", "huber")
TOP_K_OF = ("teacher", "student", "union")
TAIL_FLOOR = -math.expm1(-1e-7)  # the least probability of a tail, as published
LOG_RATIO = 20.0  # largest magnitude of an importance ratio's logarithm, as published


@dataclasses.dataclass(frozen=True)
class Divergence:
    """What is compared and how; the meaning of each field is in `config/settings.py` (`loss.*`).

    Attributes:
      divergence: fkl Σ q ln(q/p); rkl Σ p ln(p/q); jsd β KL(q‖M) + (1 - β) KL(p‖M); sampled
        -A ln p(y) with A = stop_gradient(ln q(y) - ln p(y)), y the sampled token.
      beta: of jsd, strictly between 0 and 1.
      normalize_beta: jsd divided by β (1 - β), before the clip; its limits are then fkl and rkl.
      temperature: τ > 0; both sides' logits are divided by it, no τ² anywhere.
      top_k: only the k best entries, 0 for all.
      top_k_of: whose k best: the teacher's, the student's, or those of both (k to 2k entries).
      tail: False renormalises both sides on these entries. True (top_k > 0) keeps their
        probabilities and adds one entry, all the rest, to both sides; it is at least 1e-7 and
        constant there, so that top_k = V is the whole vocabulary's divergence to within 1e-7.
      clip_mode: element min(e_v, κ) for every entry; with d = Σ e_v: token min(d, κ);
        token_weight d stop_gradient(min(1, κ/d)); huber d²/(2κ) up to κ, then d - κ/2.
      clip: κ > 0.
      sampling_temperature: > 0, of `TokenStats.logp_sampling_T` and the importance ratio.
      ratio_clip, rollout_clip: upper bounds of the two factors of `importance`; 0 is without.
    """

    divergence: str = "fkl"
    beta: float = 0.5
    normalize_beta: bool = False
    temperature: float = 1.0
    top_k: int = 0
    clip_mode: str = "none"
    clip: float = 0.05
    sampling_temperature: float = 1.0
    top_k_of: str = "teacher"
    tail: bool = False
    ratio_clip: float = 0.0
    rollout_clip: float = 0.0

    def __post_init__(self) -> None:
        known = (*DIVERGENCES, "sampled")
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
        if self.top_k_of not in TOP_K_OF:
            raise ValueError(f"top_k_of is {self.top_k_of!r}: the choices are {TOP_K_OF}")
        if self.tail and not self.top_k:
            raise ValueError("tail is True and top_k is 0: nothing is outside the whole vocabulary")
        if self.ratio_clip < 0 or self.rollout_clip < 0:
            raise ValueError(
                f"ratio_clip is {self.ratio_clip}, rollout_clip {self.rollout_clip}: "
                "they are at least 0 (off)"
            )


class TokenStats(NamedTuple):
    """Per token, float32, no gradient, in nats; 0 where the token is not looked at.

    Attributes:
      value_T: what the loss sums: the divergence, clipped, times `ratio_T`.
      logp_student_T, logp_teacher_T: of the sampled token, at the loss temperature, whole
        vocabulary.
      logp_sampling_T: of the sampled token under the student at the sampling temperature: what a
        sampler of the same weights must have found.
      entropy_student_T, entropy_teacher_T: of the distributions at the loss temperature.
      clipped_mass_T: element: teacher's mass Σ q_v on the clipped entries (q renormalised under
        top_k without a tail). token, token_weight, huber: 1 where d > κ, else 0. none: 0.
      ratio_T: the factor of `importance`; 1 where it is off.
    """

    value_T: jax.Array
    logp_student_T: jax.Array
    logp_teacher_T: jax.Array
    logp_sampling_T: jax.Array
    entropy_student_T: jax.Array
    entropy_teacher_T: jax.Array
    clipped_mass_T: jax.Array
    ratio_T: jax.Array


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
    larger = jnp.maximum(jnp.maximum(student.p, teacher.p), jnp.finfo(delta.dtype).tiny)
    # ln M - max(ln p, ln q) = ln(1 - w (1 - min/max))
    log_mix = jnp.log1p(-smaller * (jnp.abs(teacher.p - student.p) / larger))
    p_part = student.p * (jnp.minimum(-delta, 0) - log_mix) * ((1 - beta) * scale)
    q_part = teacher.p * (jnp.minimum(delta, 0) - log_mix) * (beta * scale)
    return Entry(q_part + p_part, p_part, 0.0)


def _fkl_plain(student: Side, teacher: Side, settings: Divergence, clips: bool) -> jax.Array:
    del settings, clips
    return -teacher.p * student.log


def _rkl_plain(student: Side, teacher: Side, settings: Divergence, clips: bool) -> jax.Array:
    """The derivative of ln p cancels in the sum (p in each entry, Σp = 1), unless entries clip."""
    del settings
    gap = student.log - teacher.log
    return student.p * (gap if clips else jax.lax.stop_gradient(gap))


def _jsd_plain(student: Side, teacher: Side, settings: Divergence, clips: bool) -> jax.Array:
    """βq (ln q - ln M) + (1 - β) p (ln p - ln M) is least in M: its derivative to M cancels that
    of p ln p to ln p."""
    del clips
    beta, kept = settings.beta, (teacher.p > 0) | (student.p > 0)
    log_mix = jnp.logaddexp(math.log1p(-beta) + student.log, math.log(beta) + teacher.log)
    scale = 1 / beta if settings.normalize_beta else 1 - beta
    return scale * student.p * jax.lax.stop_gradient(jnp.where(kept, student.log - log_mix, 0))


class Kind(NamedTuple):
    """An entry of the table of divergences.

    Attributes:
      entries: the terms of the sum over the vocabulary with their derivative in closed form.
      plain: a plain formula with the same derivative to the student, for automatic differentiation
        (implementation dense). Its value is not read. Terms whose derivatives add up to 0 may be
        left out. The last argument says whether single entries are clipped.
      settings: the settings that this divergence reads and others do not, such as loss.beta.
    """

    entries: Callable[[Side, Side, Divergence], Entry]
    plain: Callable[[Side, Side, Divergence, bool], jax.Array]
    settings: tuple[str, ...] = ()


DIVERGENCES: dict[str, Kind] = {
    "fkl": Kind(_fkl, _fkl_plain),
    "rkl": Kind(_rkl, _rkl_plain),
    "jsd": Kind(_jsd, _jsd_plain, settings=("loss.beta", "loss.normalize_beta")),
}


def entries(
    student: Side, teacher: Side, settings: Divergence
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """e, b and which entries are clipped, for sides of one shape.

    Sums over the vocabulary of e and b are the token's divergence and the Σb of `dz`.

    Returns:
      e: shifted, after the clip of mode element.
      b: shifted, with ∂e_v/∂ln p_v = 0 at clipped entries.
      clipped: bool; None unless the mode is element.
    """
    entry = DIVERGENCES[settings.divergence].entries(student, teacher, settings)
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
    # Below the maximum all along: top + ln Σ would lose the digits of ln Σ where logits are large.
    below = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(below)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return Side(weights * (1 / total), below - jnp.log(total))


def pick(x_TV: jax.Array, tokens_T: jax.Array) -> jax.Array:
    """x_TV[t, tokens_T[t]], [T]."""
    return jnp.take_along_axis(x_TV, tokens_T[:, None], axis=1)[:, 0]


def entropy(distribution: Side) -> jax.Array:
    """-Σ p ln p over the last axis."""
    return -jnp.sum(distribution.p * distribution.log, axis=-1)


# --- the entries that a loss sees ------------------------------------------------------------


class Kept(NamedTuple):
    """Ids of the top k, the same for both sides; constants to differentiation.

    Attributes:
      ids_TK: int32; K is k, or 2k for the union.
      first_TK: False where the union names an id for the second time; None if none can be.
    """

    ids_TK: jax.Array
    first_TK: jax.Array | None


def kept(logits_s_TV: jax.Array, logits_t_TV: jax.Array, settings: Divergence) -> Kept:
    """The entries of settings.top_k and top_k_of; lower ids win ties."""
    sides = {"teacher": (logits_t_TV,), "student": (logits_s_TV,)}
    chosen = sides.get(settings.top_k_of, (logits_s_TV, logits_t_TV))
    best = [jax.lax.top_k(jax.lax.stop_gradient(x), settings.top_k)[1] for x in chosen]
    if len(best) == 1:
        return Kept(best[0], None)
    again_TK = jnp.any(best[1][:, :, None] == best[0][:, None, :], axis=-1)
    first = jnp.concatenate([jnp.ones_like(again_TK), ~again_TK], axis=1)
    return Kept(jnp.concatenate(best, axis=1), first)


def restrict(
    logits_TV: jax.Array, whole: Side, kept: Kept, settings: Divergence
) -> tuple[Side, jax.Array | None]:
    """One side on the kept entries: renormalised, or as they are and a tail in the last column.

    Second mentions of an id have p = 0 and log = 0 on both sides, so that all terms vanish.

    Args:
      whole: side(logits_TV).

    Returns:
      The side [T, K] or [T, K + 1], and bool [T, 1], False where the tail is at its floor; None
      without a tail.
    """
    ids_TK, first_TK = kept

    def take(x_TV: jax.Array, fill: float) -> jax.Array:
        x_TK = jnp.take_along_axis(x_TV, ids_TK, axis=1)
        return x_TK if first_TK is None else jnp.where(first_TK, x_TK, fill)

    if settings.tail:
        # The published ln(1 - Σ_N p), without its cancellation: in float32 that one is mostly
        # rounding from tails of 1e-6 down.
        rest_TV = whole.p.at[jnp.arange(ids_TK.shape[0])[:, None], ids_TK].set(0)
        rest_T1 = jnp.sum(rest_TV, axis=1, keepdims=True)
        open_T1 = rest_T1 > TAIL_FLOOR
        rest_T1 = jnp.where(open_T1, rest_T1, TAIL_FLOOR)
        p = jnp.concatenate([take(whole.p, 0), rest_T1], axis=1)
        return Side(p, jnp.concatenate([take(whole.log, 0), jnp.log(rest_T1)], axis=1)), open_T1
    inside = side(take(logits_TV, -jnp.inf))
    if first_TK is None:
        return inside, None
    return Side(inside.p, jnp.where(first_TK, inside.log, 0)), None


def _spread(dz_TK: jax.Array, student: Side, whole_p_TV: jax.Array, kept: Kept) -> jax.Array:
    """Gradients of the kept entries, and of the tail if there is one, to all V logits.

    Args:
      dz_TK: [T, K] or [T, K + 1], as `student`.
    """
    ids_TK, first_TK = kept
    count, vocabulary = ids_TK.shape[1], whole_p_TV.shape[1]
    dz_TV = jnp.zeros_like(whole_p_TV)
    if dz_TK.shape[1] > count:
        dz_TV = whole_p_TV * (dz_TK[:, -1:] / student.p[:, -1:])
    if first_TK is not None:  # past the end, where nothing is written, and each somewhere else
        past_1K = vocabulary + jnp.arange(count, dtype=ids_TK.dtype)[None]
        ids_TK = jnp.where(first_TK, ids_TK, past_1K)
    row_T1 = jnp.arange(dz_TK.shape[0])[:, None]
    return dz_TV.at[row_T1, ids_TK].set(dz_TK[:, :count], unique_indices=True, mode="drop")


# --- a block of tokens ------------------------------------------------------------------------


def block(
    logits_s_TV: jax.Array,
    logits_t_TV: jax.Array,
    tokens_T: jax.Array,
    settings: Divergence,
    logp_old_T: jax.Array | None = None,
    logp_rollout_T: jax.Array | None = None,
) -> tuple[TokenStats, jax.Array]:
    """Statistics of a block of tokens and the gradient of each token's value.

    Args:
      logits_s_TV, logits_t_TV: float32 (or 64), student and teacher, not yet divided by τ.
      tokens_T: int32, the sampled tokens.
      logp_old_T, logp_rollout_T: see `importance`.

    Returns:
      The statistics, and dz_TV, ∂value_t / ∂logits_s[t, v], in the logits' dtype.
    """
    scale = 1 / settings.temperature
    sampling_T = log_prob(logits_s_TV, tokens_T, settings.sampling_temperature)
    logits_s_TV, logits_t_TV = logits_s_TV * scale, logits_t_TV * scale
    student, teacher = side(logits_s_TV), side(logits_t_TV)
    logp_T, logq_T = pick(student.log, tokens_T), pick(teacher.log, tokens_T)
    if settings.divergence == "sampled":
        advantage_T = logq_T - logp_T
        value_T = -advantage_T * logp_T
        dz_TV = advantage_T[:, None] * _misses(student, tokens_T)
        mass_T = jnp.zeros_like(value_T)
    elif settings.top_k:
        few = kept(logits_s_TV, logits_t_TV, settings)
        inside, open_T1 = restrict(logits_s_TV, student, few, settings)
        inside_t, _ = restrict(logits_t_TV, teacher, few, settings)
        value_T, dz_TK, mass_T = _divergence(inside, inside_t, settings, open_T1)
        dz_TV = _spread(dz_TK, inside, student.p, few)
    else:
        value_T, dz_TV, mass_T = _divergence(student, teacher, settings)
    ratio_T = importance(sampling_T, logp_old_T, logp_rollout_T, settings)
    stats = TokenStats(
        value_T * ratio_T, logp_T, logq_T, sampling_T,
        entropy(student), entropy(teacher), mass_T, ratio_T,
    )  # fmt: skip
    return stats, dz_TV * (scale * ratio_T)[:, None]


def _smooth_entries(
    student: Side, teacher: Side, settings: Divergence
) -> tuple[jax.Array, jax.Array | None]:
    """`entries` with the derivative of their plain formulas, for automatic differentiation.

    Values are those of `entries`; a term of value 0 carries the derivative. It leaves out the
    shift and other terms whose derivatives add up to 0: they would leave only their rounding.
    """
    e, _, clipped = entries(*jax.lax.stop_gradient((student, teacher)), settings)
    plain = DIVERGENCES[settings.divergence].plain
    moves = plain(student, teacher, settings, clipped is not None)
    if clipped is not None:
        moves = jnp.where(clipped, 0, moves)
    # Equal sides are the minimum: the derivative is 0 there, rounding apart.
    equal_T1 = jnp.all(student.p == teacher.p, axis=-1, keepdims=True)
    return e + jnp.where(equal_T1, 0, moves - jax.lax.stop_gradient(moves)), clipped


def value(
    logits_s_TV: jax.Array, logits_t_TV: jax.Array, tokens_T: jax.Array, settings: Divergence
) -> tuple[jax.Array, jax.Array]:
    """Value and clipped mass of each token, [T], for automatic differentiation: no closed form of
    the softmax's gradient; see `_smooth_entries`.

    Args: as of `block`.
    """
    logits_s_TV = logits_s_TV * (1 / settings.temperature)
    logits_t_TV = logits_t_TV * (1 / settings.temperature)
    student, teacher = side(logits_s_TV), side(logits_t_TV)
    if settings.divergence == "sampled":
        logp_T = pick(student.log, tokens_T)
        advantage_T = jax.lax.stop_gradient(pick(teacher.log, tokens_T) - logp_T)
        return -advantage_T * logp_T, jnp.zeros_like(logp_T)
    if settings.top_k:
        few = kept(logits_s_TV, logits_t_TV, settings)
        student, _ = restrict(logits_s_TV, student, few, settings)
        teacher, _ = restrict(logits_t_TV, teacher, few, settings)
    e_TK, clipped_TK = _smooth_entries(student, teacher, settings)
    d_T = jnp.sum(e_TK, axis=-1)
    kappa = settings.clip
    value_T = {
        "none": lambda: d_T,
        "element": lambda: d_T,
        "token": lambda: jnp.where(d_T > kappa, kappa, d_T),
        "token_weight": lambda: (
            d_T * jax.lax.stop_gradient(jnp.where(d_T > kappa, kappa / d_T, 1.0))
        ),
        "huber": lambda: jnp.where(d_T > kappa, d_T - kappa / 2, d_T * d_T / (2 * kappa)),
    }[settings.clip_mode]()
    return value_T, clipped_mass(d_T, clipped_TK, teacher, settings)


def importance(
    logp_T: jax.Array,
    logp_old_T: jax.Array | None,
    logp_rollout_T: jax.Array | None,
    settings: Divergence,
) -> jax.Array:
    """min(exp(s - old), ratio_clip) · min(exp(old - rollout), rollout_clip), a constant, [T].

    Sources: SDPO (arXiv 2601.20802) for the first factor, truncated importance sampling against
    the sampler's own numbers for the second. A clip of 0 leaves its factor out.

    Args:
      logp_T: s, of the sampled tokens under the student at the sampling temperature.
      logp_old_T: the same when the rollouts were drawn; None for now, which makes old = s.
      logp_rollout_T: what the sampler found; needed where rollout_clip is on.

    Raises:
      ValueError: rollout_clip without logp_rollout_T.
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


def log_prob(logits_TV: jax.Array, tokens_T: jax.Array, temperature: float) -> jax.Array:
    """ln softmax(logits / temperature)[token], [T]."""
    tempered_TV = logits_TV * (1 / temperature)
    below_TV = tempered_TV - jax.lax.stop_gradient(jnp.max(tempered_TV, axis=-1, keepdims=True))
    return pick(below_TV, tokens_T) - jnp.log(jnp.sum(jnp.exp(below_TV), axis=-1))


def score(
    logits_TV: jax.Array, tokens_T: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of given tokens and entropy, [T], and the former's gradient to the logits."""
    scale = 1 / temperature
    student = side(logits_TV * scale)
    return pick(student.log, tokens_T), entropy(student), _misses(student, tokens_T) * -scale


def _misses(student: Side, tokens_T: jax.Array) -> jax.Array:
    """p - 1[y], [T, V]: -∂ln p(y) / ∂(tempered logits)."""
    vocabulary_1V = jnp.arange(student.p.shape[1], dtype=tokens_T.dtype)[None]
    return jnp.where(vocabulary_1V == tokens_T[:, None], student.p - 1, student.p)


def _divergence(
    student: Side, teacher: Side, settings: Divergence, open_T1: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Value [T], its gradient to the tempered logits of the entries [T, K], clipped mass [T]."""
    e_TK, b_TK, clipped_TK = entries(student, teacher, settings)
    if open_T1 is not None:  # a tail at its floor does not move
        b_TK = jnp.concatenate([b_TK[:, :-1], jnp.where(open_T1, b_TK[:, -1:], 0)], axis=1)
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
