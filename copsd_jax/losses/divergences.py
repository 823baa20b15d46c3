"""The divergences between two next-token distributions, entry by entry, in closed form.

To add a divergence, write one function that returns an `Entry` (value and derivative), and add the
function to `DIVERGENCES`. `dense`, `chunked` and the settings then support the new divergence. The
Pallas kernels support only the divergences that the kernels are tested with. For other divergences,
`auto` means `chunked`.

Shapes: T tokens, V vocabulary entries, K entries that the loss uses (all V, or the kept entries and
possibly a tail).

Notation: p is the student's distribution, and q is the teacher's distribution. Both distributions
are computed from logits that are divided by the loss temperature τ. The mixture is
M = (1 - β) p + β q. Every divergence is a sum of entries e_v over the vocabulary. If b_v denotes
∂e_v / ∂ln p_v = p_v ∂e_v / ∂p_v, the gradient of the student's logits is

    dz = (b - p Σb) / τ.

Adding a multiple of p to b leaves dz unchanged, because Σp = 1. Adding a multiple of p - q to e
leaves Σe unchanged, because Σp = Σq. The functions shift b by a multiple of p, and e by the same
multiple of p - q, so that b_v = 0 and e_v = 0 wherever p_v = q_v. Equal distributions therefore
give exactly zero, even in float32, where Σp is only approximately 1. No function divides by p or q.

The functions contain no matmul and work on blocks of any shape, so that a kernel can call these
functions on tiles of the vocabulary. `tests/oracle.py` computes the same divergences with plain
formulas.
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
    """Settings of the divergence, which correspond to `loss.*` in `config/settings.py`.

    Attributes:
      divergence: a key of `DIVERGENCES`, or sampled.
      beta: weight of the teacher in jsd's mixture M, strictly between 0 and 1.
      normalize_beta: whether jsd is divided by β (1 - β) before the clip. As β tends to 0, the
        divided jsd tends to fkl; as β tends to 1, the divided jsd tends to rkl.
      temperature: number τ > 0 by which the logits of both sides are divided. The loss is not
        multiplied by τ².
      top_k: number of most probable entries that the loss uses; 0 means all entries.
      top_k_of: `teacher` keeps the teacher's k most probable entries. `student` keeps the student's
        k most probable entries. `union` keeps the k most probable entries of each side, which makes
        k to 2k entries in total.
      tail: False renormalises both sides over the kept entries. True, which needs top_k above 0,
        leaves the probabilities unchanged, and adds one tail entry that stands for all other ids.
        The tail's probability is at least 1e-7; a tail at this floor has no gradient. With
        top_k = V, the result is therefore the divergence over the whole vocabulary, with an error
        of at most 1e-7.
      clip_mode: the formula of the clip. Let d = Σ e_v. `none` clips nothing. `element` replaces
        every entry by min(e_v, κ). `token` replaces d by min(d, κ). `token_weight` replaces d by
        d · stop_gradient(min(1, κ/d)). `huber` replaces d by d²/(2κ) if d ≤ κ, and by d - κ/2 if
        d > κ.
      clip: the bound κ > 0 that clip_mode uses.
      sampling_temperature: temperature above 0, used for `TokenStats.logp_sampling_T` and for the
        importance ratio.
      ratio_clip, rollout_clip: upper bounds of the two factors in `clips.clip_importance_ratio`. If
        a bound is 0, the corresponding factor is 1.

    Raises:
      ValueError: a value is out of range, or two settings cannot be used together.
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
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if self.divergence == "sampled" and (self.top_k or self.clip_mode != "none"):
            raise ValueError(f"the sampled divergence needs top_k 0 and clip_mode none: {self}")
        if self.top_k_of not in TOP_K_OF:
            raise ValueError(f"top_k_of is {self.top_k_of!r}: the choices are {TOP_K_OF}")
        if self.tail and not self.top_k:
            raise ValueError("tail is True and top_k is 0: a tail needs top_k above 0")


class Entry(NamedTuple):
    """The unclipped terms of the sum over the vocabulary, and the derivatives of the terms.

    Attributes:
      e: the entries e_v before the shift.
      b: ∂e_v / ∂ln p_v + shift · p_v.
      shift: the multiple of p that makes b_v = 0 where p_v = q_v.
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

    ln M is computed relative to the larger of ln p and ln q, so nothing overflows. Where p = q,
    ln M is exactly equal to ln p.
    """
    beta = settings.beta
    scale = 1 / (beta * (1 - beta)) if settings.normalize_beta else 1.0
    delta = teacher.log - student.log
    # The weight that the mixture M gives to the side with the smaller probability.
    smaller = jnp.where(delta > 0, 1 - beta, beta)
    larger = jnp.maximum(jnp.maximum(student.p, teacher.p), jnp.finfo(delta.dtype).tiny)
    # With w = `smaller`: ln M - max(ln p, ln q) = ln(1 - w (1 - min(p, q) / max(p, q)))
    log_mix = jnp.log1p(-smaller * (jnp.abs(teacher.p - student.p) / larger))
    p_part = student.p * (jnp.minimum(-delta, 0) - log_mix) * ((1 - beta) * scale)
    q_part = teacher.p * (jnp.minimum(delta, 0) - log_mix) * (beta * scale)
    return Entry(q_part + p_part, p_part, 0.0)


def _forward_kl_plain(student: Distribution, teacher: Distribution, _: Divergence) -> jax.Array:
    return -teacher.p * student.log


def _reverse_kl_plain(
    student: Distribution, teacher: Distribution, settings: Divergence
) -> jax.Array:
    """Drops the term p · ∂ ln p unless clip_mode is element; this term sums to ∂(Σp) = 0."""
    gap = student.log - teacher.log
    return student.p * (gap if settings.clip_mode == "element" else jax.lax.stop_gradient(gap))


def _jensen_shannon_plain(
    student: Distribution, teacher: Distribution, settings: Divergence
) -> jax.Array:
    """Drops the derivatives through ln M and through ln p, because they cancel each other.

    For e = β q (ln q - ln M) + (1 - β) p (ln p - ln M), the derivative through ln M is
    -(1 - β) ∂p, and the derivative through ln p is (1 - β) ∂p.
    """
    beta, present = settings.beta, (teacher.p > 0) | (student.p > 0)
    log_mix = jnp.logaddexp(math.log1p(-beta) + student.log, math.log(beta) + teacher.log)
    scale = 1 / beta if settings.normalize_beta else 1 - beta
    return scale * student.p * jax.lax.stop_gradient(jnp.where(present, student.log - log_mix, 0))


Formula = Callable[[Distribution, Distribution, Divergence], jax.Array]


class Kind(NamedTuple):
    """One divergence in the table `DIVERGENCES`.

    Attributes:
      entry: function that returns the `Entry` of this divergence, in closed form.
      plain: formula that the implementation `dense` differentiates automatically. The derivative of
        the formula with respect to the student equals the closed form in `entry`. The value of the
        formula is not used. The formula may drop terms whose derivatives sum to 0 over the
        vocabulary, because these terms would only add rounding errors. If `plain` is None, `dense`
        differentiates the value of `entry` instead.
      settings: names of the settings that only this divergence reads, such as loss.beta.
    """

    entry: Callable[[Distribution, Distribution, Divergence], Entry]
    plain: Formula | None = None
    settings: tuple[str, ...] = ()


# This table contains all divergences that are sums over entries. The divergence `sampled` is not in
# this table, because `sampled` is not a sum over entries. The value of `sampled` is -A · ln p(y),
# where y is the sampled token and A = stop_gradient(ln q(y) - ln p(y)). Functions that compute one
# value per token treat `sampled` as a special case.
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
    """Computes e and b of all entries, after the element clip and the shift.

    Student and teacher must have the same shape. The sum of e over the vocabulary is the token's
    divergence. The sum of b over the vocabulary is the Σb in the formula for dz.

    Returns:
      e: the shifted entries, in the shape of the student; clipped if clip_mode is element.
      b: the shifted derivatives, in the same shape; ∂e_v/∂ln p_v is 0 for clipped entries.
      clipped: bool, True for clipped entries, in the same shape; None unless clip_mode is element.
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
