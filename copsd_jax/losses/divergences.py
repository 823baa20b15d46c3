"""The divergences between two next-token distributions, entry by entry, in closed form.

To add a divergence, write one function that returns an `Entry` (value and derivative) and give it a
line in `DIVERGENCES`. The settings, `dense` and `chunked` then know it. The Pallas kernels list
the divergences that they are tested with, and `auto` leaves others to `chunked`.

Notation (T tokens, V vocabulary, K entries that the loss sees: V, or some top k and their tail):
p is the student's and q the teacher's distribution after division of the logits by the loss
temperature τ, M = (1 - β) p + β q. Every divergence is a sum over entries e_v. With
b_v = ∂e_v / ∂ln p_v = p_v ∂e_v / ∂p_v the gradient to the student's logits is

    dz = (b - p Σb) / τ.

Adding a multiple of p to b leaves dz unchanged (Σp = 1), and adding the same multiple of p - q to e
leaves Σe unchanged. Both are shifted here so that b_v = 0 and e_v = 0 wherever p_v = q_v. Equal
sides then give exactly zero, also in float32, where Σp is only nearly 1. Nothing is divided by p
or q.

The functions contain no matmul and work on blocks of any shape, so that a kernel over tiles of the
vocabulary can call them. `tests/oracle.py` has the same divergences in plain formulas.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import distributions

Distribution = distributions.Distribution
CLIP_MODES = ("none", "element", "token", "token_weight", "huber")
TOP_K_OF = ("teacher", "student", "union")


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Settings of the divergence, as `loss.*` in `config/settings.py`.

    Attributes:
      divergence: a name of `DIVERGENCES`, or sampled.
      beta: weight of the teacher in jsd's mixture M, strictly between 0 and 1.
      normalize_beta: whether jsd is divided by β (1 - β), before the clip. Its limits for β to 0
        and 1 are then fkl and rkl.
      temperature: τ > 0. Divides the logits of both sides; the loss is not multiplied by τ².
      top_k: number of best entries that the loss sees, 0 for all.
      top_k_of: the side whose k best are taken; union takes those of both (k to 2k entries).
      tail: False renormalises both sides on these entries. True (needs top_k > 0) keeps their
        probabilities and adds one entry for all others to both sides. That entry is at least 1e-7
        and constant there, so top_k = V gives the whole vocabulary's divergence to within 1e-7.
      clip_mode: element: min(e_v, κ) for every entry. With d = Σ e_v, token: min(d, κ);
        token_weight: d stop_gradient(min(1, κ/d)); huber: d²/(2κ) up to κ, then d - κ/2.
      clip: κ > 0.
      sampling_temperature: temperature > 0 of `TokenStats.logp_sampling_T` and of the importance
        ratio.
      ratio_clip, rollout_clip: upper bounds of the two factors of `clips.importance_ratio`; 0
        leaves the factor out.

    Raises:
      ValueError: a value out of range, or settings that exclude each other.
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
        for name in ("temperature", "sampling_temperature", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("top_k", "ratio_clip", "rollout_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0 (off)")
        if self.divergence == "sampled" and (self.top_k or self.clip_mode != "none"):
            raise ValueError(f"the sampled divergence takes top_k 0 and clip_mode none: {self}")
        if self.top_k_of not in TOP_K_OF:
            raise ValueError(f"top_k_of is {self.top_k_of!r}: the choices are {TOP_K_OF}")
        if self.tail and not self.top_k:
            raise ValueError("tail is True and top_k is 0: nothing is outside the whole vocabulary")


class Entry(NamedTuple):
    """Terms of the sum over the vocabulary before the clip, and their derivative.

    Attributes:
      e: the entry e_v, not yet shifted.
      b: ∂e_v / ∂ln p_v + shift · p_v.
      shift: the multiple of p that makes b vanish at p_v = q_v.
    """

    e: jax.Array
    b: jax.Array
    shift: float


def _forward_kl(student: Distribution, teacher: Distribution, _: Divergence) -> Entry:
    """Returns e = q ln(q/p)."""
    return Entry(teacher.p * (teacher.log - student.log), student.p - teacher.p, 1.0)


def _reverse_kl(student: Distribution, teacher: Distribution, _: Divergence) -> Entry:
    """Returns e = p ln(p/q)."""
    e = student.p * (student.log - teacher.log)
    return Entry(e, e, -1.0)


def _jensen_shannon(student: Distribution, teacher: Distribution, settings: Divergence) -> Entry:
    """Returns e = β q ln(q/M) + (1 - β) p ln(p/M).

    ln M is taken relative to the larger side: it cannot overflow, and is exactly ln p where p = q.
    """
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


def _forward_kl_plain(student: Distribution, teacher: Distribution, _: Divergence) -> jax.Array:
    return -teacher.p * student.log


def _reverse_kl_plain(
    student: Distribution, teacher: Distribution, settings: Divergence
) -> jax.Array:
    """Drops the derivative of ln p unless entries are clipped: it is p, and Σp = 1."""
    gap = student.log - teacher.log
    return student.p * (gap if settings.clip_mode == "element" else jax.lax.stop_gradient(gap))


def _jensen_shannon_plain(
    student: Distribution, teacher: Distribution, settings: Divergence
) -> jax.Array:
    """Drops the dependence on M, at whose value e is least.

    The derivative of βq (ln q - ln M) + (1 - β) p (ln p - ln M) to M cancels that of p ln p to
    ln p.
    """
    beta, present = settings.beta, (teacher.p > 0) | (student.p > 0)
    log_mix = jnp.logaddexp(math.log1p(-beta) + student.log, math.log(beta) + teacher.log)
    scale = 1 / beta if settings.normalize_beta else 1 - beta
    return scale * student.p * jax.lax.stop_gradient(jnp.where(present, student.log - log_mix, 0))


Formula = Callable[[Distribution, Distribution, Divergence], jax.Array]


class Kind(NamedTuple):
    """An entry of the table of divergences.

    Attributes:
      entry: the terms of the sum over the vocabulary with their derivative in closed form.
      plain: a formula with the same derivative to the student, for automatic differentiation
        (implementation dense); only its derivative is used. It may drop terms whose derivatives add
        up to 0 over the vocabulary and would only leave their rounding. None stands for the entry's
        value itself.
      settings: the settings that this divergence reads and others do not, such as loss.beta.
    """

    entry: Callable[[Distribution, Distribution, Divergence], Entry]
    plain: Formula | None = None
    settings: tuple[str, ...] = ()


# The divergences that are sums over entries. One more, `sampled`, is -A ln p(y) with
# A = stop_gradient(ln q(y) - ln p(y)) and y the sampled token; functions over whole tokens treat it
# apart.
DIVERGENCES: dict[str, Kind] = {
    "fkl": Kind(_forward_kl, _forward_kl_plain),  # KL(q ‖ p) = Σ q ln(q/p)
    "rkl": Kind(_reverse_kl, _reverse_kl_plain),  # KL(p ‖ q) = Σ p ln(p/q)
    "jsd": Kind(  # β KL(q ‖ M) + (1 - β) KL(p ‖ M)
        _jensen_shannon, _jensen_shannon_plain, settings=("loss.beta", "loss.normalize_beta")
    ),
}


def compute_entries(
    student: Distribution, teacher: Distribution, settings: Divergence
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Computes e and b after the clip of single entries and the shift, for sides of one shape.

    The sum of e over the vocabulary is the token's divergence, and that of b is the Σb of `dz`.

    Returns:
      e: shifted, after the clip of mode element; the shape of the sides.
      b: shifted, with ∂e_v/∂ln p_v = 0 at clipped entries; the shape of the sides.
      clipped: bool of the same shape, or None unless the mode is element.
    """
    entry = DIVERGENCES[settings.divergence].entry(student, teacher, settings)
    e, b, clipped = entry.e, entry.b, None
    if settings.clip_mode == "element":
        clipped = e > settings.clip
        e = jnp.where(clipped, settings.clip, e)
        b = jnp.where(clipped, entry.shift * student.p, b)
    if entry.shift:
        e = e + entry.shift * (student.p - teacher.p)
    return e, b, clipped
