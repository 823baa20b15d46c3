"""What the divergence kernels of all chips share: rows of statistics between their passes.

Notation (T tokens of a block, V vocabulary of this shard, I tiles of it): p = softmax(z_s / τ) and
q = softmax(z_t / τ), of student and teacher. A pass over a block leaves partial statistics of each
row and tile, [I, T]; the functions here join them over tiles and over the shards of the vocabulary,
and turn them into `TokenStats`. All of it is float32 and small: T · I numbers for T · V entries.

The passes are

  1 logits      maxima, Σ exp, Σ exp · z of both sides  -> log-sum-exps, entropies
  2 sums        Σ e, Σ b, Σ p, Σ q over clipped entries -> value, Σb; see `two_passes`
  3 gradient    dz = (b - p Σb / Σp) and its matmul, the head's if it trains

The factor of a row (clip of whole tokens, importance ratio, weight, 1/τ) multiplies the row of the
hidden states' gradient at the end, and the row of the hidden states in the head's gradient.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import divergences

ROW_STATS = 8  # numbers of a row and tile that a pass leaves or reads at most
EMPTY = -1e30  # a logit that is none; below any maximum, which starts at FLOOR
FLOOR = -1e29


class Rows(NamedTuple):
    """Per token, [T]; the last two None where `divergences.importance` does not read them."""

    tokens_T: jax.Array
    weight_T: jax.Array
    logp_old_T: jax.Array | None
    logp_rollout_T: jax.Array | None


class Partials(NamedTuple):
    """Of one side, row and tile: top = max z/τ, Σ w and Σ w (z/τ - top) for w = exp(z/τ - top)."""

    top_IT: jax.Array
    sum_IT: jax.Array
    moment_IT: jax.Array


class Softmax(NamedTuple):
    """Of the whole vocabulary, [T]: ln p = (z/τ - top) - log; and the entropy in nats.

    Their sum, the log-sum-exp, would lose the digits of `log` where logits are large.
    """

    top_T: jax.Array
    log_T: jax.Array
    entropy_T: jax.Array

    def log_prob(self, logit: jax.Array) -> jax.Array:
        """Of a logit [T] or [I, T], divided by τ."""
        behind = (None,) * (logit.ndim - 1)
        return (logit - self.top_T[behind]) - self.log_T[behind]


class Sums(NamedTuple):
    """Of the whole vocabulary, [T]: Σ e, Σ b, Σ p, and the teacher's mass on clipped entries."""

    e_T: jax.Array
    b_T: jax.Array
    p_T: jax.Array
    mass_T: jax.Array


class Known(NamedTuple):
    """What pass 1 tells of a block; the logits are of the sampled token, divided by τ, [T]."""

    student: Softmax
    teacher: Softmax
    sampling_T: jax.Array  # ln p of the sampled token at the sampling temperature
    logp_T: jax.Array
    logq_T: jax.Array


class Vocabulary(NamedTuple):
    """Of this shard's head: its rows, the whole vocabulary's real entries (None: all), its axis."""

    size: int
    entries: int | None
    axis: str | None


class Passes(NamedTuple):
    """What a chip's kernels do with a block; `kept` is a tuple of arrays of its own [T, V].

    Attributes:
      logits: (here_1, hidden, heads) -> kept, and statistics [I, 8, T] in rows 0 to 2 (student) and
        3 to 5 (teacher) as in `Partials`, 6 the student's Σ exp at the sampling temperature.
      coefficients: (known, sides, local_T, Σb/Σp) -> what the other two read of rows and tiles.
      sums: (here_1, coefficients, kept) -> `Sums` in rows 0 to 3 of [I, 8, T].
      gradient: (here_1, coefficients, kept, head_VD, head_part) -> dz W [T, D], sums if `fused`
        else None, and the head's gradient; head_part is None or (scaled hidden states, gradient).
    """

    logits: Callable
    coefficients: Callable
    sums: Callable
    gradient: Callable


def two_passes(settings: divergences.Divergence, train_head: bool) -> bool:
    """Whether pass 2 is needed: Σb is not 0 in closed form, or a row's factor waits for Σe."""
    if settings.divergence == "sampled":
        return False
    late = settings.clip_mode != "none" and train_head
    return settings.divergence != "fkl" or settings.clip_mode == "element" or late


def fused(settings: divergences.Divergence, train_head: bool) -> bool:
    """Whether Σe comes with the gradient."""
    return settings.divergence != "sampled" and not two_passes(settings, train_head)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Accumulated in float32; float32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


def total(x: jax.Array, vocab_axis: str | None) -> jax.Array:
    return x if vocab_axis is None else jax.lax.psum(x, vocab_axis)


def softmax(partials: Partials, vocab_axis: str | None, scale: float = 1.0) -> Softmax:
    """Joins tiles and shards.

    With `scale`, of softmax(scale · z / τ), whose sums were taken of exp(scale (z/τ - top)): then
    ln p = scale (z/τ - top) - log. Scaling a large maximum by itself would round it away.
    """
    top_T = jnp.max(partials.top_IT, axis=0)
    if vocab_axis is not None:
        top_T = jax.lax.pmax(top_T, vocab_axis)
    below_IT = (partials.top_IT - top_T[None]) * scale
    weight_IT = jnp.exp(below_IT)
    sum_T = total(jnp.sum(weight_IT * partials.sum_IT, axis=0), vocab_axis)
    moment_IT = weight_IT * (partials.moment_IT + below_IT * partials.sum_IT)
    mean_T = total(jnp.sum(moment_IT, axis=0), vocab_axis) / sum_T
    log_T = jnp.log(sum_T)
    return Softmax(top_T, log_T, log_T - mean_T)


def local(tokens_T: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """Row of each token in this shard's head; out of range where another shard has it."""
    if vocabulary.axis is None:
        return tokens_T
    shard = jax.lax.axis_index(vocabulary.axis).astype(tokens_T.dtype)
    return tokens_T - shard * vocabulary.size


def entries_here(vocabulary: Vocabulary) -> jax.Array:
    """Real entries among this shard's rows of the head, int32."""
    if vocabulary.entries is None:
        return jnp.full((), vocabulary.size, jnp.int32)
    entries = jnp.full((), vocabulary.entries, jnp.int32)
    if vocabulary.axis is not None:
        entries -= jax.lax.axis_index(vocabulary.axis).astype(jnp.int32) * vocabulary.size
    return jnp.clip(entries, 0, vocabulary.size)


def token_logits(
    hidden_TD: jax.Array, head_VD: jax.Array, local_T: jax.Array, vocab_axis: str | None
) -> jax.Array:
    """h_t · W[y_t] over all shards, [T]: T gathered rows instead of a comparison per entry."""
    size = head_VD.shape[0]
    row_TD = head_VD[jnp.clip(local_T, 0, size - 1)].astype(jnp.float32)
    logit_T = jnp.sum(hidden_TD.astype(jnp.float32) * row_TD, axis=1)
    return total(jnp.where((local_T >= 0) & (local_T < size), logit_T, 0), vocab_axis)


def known(
    settings: divergences.Divergence,
    stats_I8T: jax.Array,
    hidden: tuple,
    heads: tuple,
    local_T: jax.Array,
    vocab_axis: str | None,
) -> tuple[Known, tuple[Partials, ...]]:
    """Joins the tiles of pass 1; also returns both sides' statistics by tile."""
    sides = tuple(Partials(*(stats_I8T[:, 3 * k + i] for i in range(3))) for k in (0, 1))
    student, teacher = (softmax(side, vocab_axis) for side in sides)
    logit_s_T, logit_t_T = (
        token_logits(x_TD, head_VD, local_T, vocab_axis) * (1 / settings.temperature)
        for x_TD, head_VD in zip(hidden, (heads[0], heads[-1]), strict=True)
    )
    logp_T = sampling_T = student.log_prob(logit_s_T)
    if settings.sampling_temperature != settings.temperature:
        scale = settings.temperature / settings.sampling_temperature
        log_T = softmax(sides[0]._replace(sum_IT=stats_I8T[:, 6]), vocab_axis, scale).log_T
        sampling_T = (logit_s_T - student.top_T) * scale - log_T
    return Known(student, teacher, sampling_T, logp_T, teacher.log_prob(logit_t_T)), sides


def join(sums_I8T: jax.Array, vocab_axis: str | None) -> Sums:
    sums_8T = total(jnp.sum(sums_I8T, axis=0), vocab_axis)
    return Sums(*(sums_8T[k] for k in range(4)))


def finish(
    settings: divergences.Divergence, known: Known, sums: Sums, rows: Rows
) -> tuple[divergences.TokenStats, jax.Array]:
    """TokenStats, and the factor of each row's gradient without its weight, [T].

    Args:
      sums: not read for the sampled token, whose value needs none.
    """
    if settings.divergence == "sampled":
        factor_T = known.logq_T - known.logp_T
        value_T, mass_T = -factor_T * known.logp_T, jnp.zeros_like(factor_T)
    else:
        value_T, factor_T = divergences.token_clip(sums.e_T, settings)
        mass_T = sums.mass_T
        if settings.clip_mode != "element":
            side = divergences.Side(mass_T, mass_T)  # read by mode element alone
            mass_T = divergences.clipped_mass(sums.e_T, None, side, settings)
    ratio_T = divergences.importance(
        known.sampling_T, rows.logp_old_T, rows.logp_rollout_T, settings
    )
    stats = divergences.TokenStats(
        value_T * ratio_T, known.logp_T, known.logq_T, known.sampling_T,
        known.student.entropy_T, known.teacher.entropy_T, mass_T, ratio_T,
    )  # fmt: skip
    return stats, factor_T * ratio_T * (1 / settings.temperature)


def scaled(x_TD: jax.Array, factor_T: jax.Array) -> jax.Array:
    """Rows times numbers in float32, rounded once to the dtype of x."""
    return (x_TD.astype(jnp.float32) * factor_T[:, None]).astype(x_TD.dtype)


def check(
    settings: divergences.Divergence, hidden: tuple, heads: tuple, vocab_size: int | None
) -> None:
    """Raises ValueError for what no kernel takes."""
    if settings.top_k:
        raise ValueError(
            f"top_k is {settings.top_k}: the kernels take the whole vocabulary (0); "
            "implementation=chunked takes the k best"
        )
    dtypes = {x.dtype for x in hidden}
    if len(dtypes) != 1 or not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        raise ValueError(
            f"hidden states are {[str(x.dtype) for x in hidden]}: the kernels take float32 or "
            "bfloat16, both sides alike"
        )
    if len({x.shape for x in heads}) != 1:
        raise ValueError(f"the heads are {[x.shape for x in heads]}: one shape is needed")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}: it must be at least 1, or None for all")


def sweep(
    settings: divergences.Divergence,
    passes: Passes,
    hidden: tuple[jax.Array, jax.Array],
    heads: tuple[jax.Array, ...],
    rows: Rows,
    vocabulary: Vocabulary,
    *,
    train_head: bool,
    block: int,
) -> tuple[divergences.TokenStats, jax.Array, jax.Array | None]:
    """All passes over blocks of `block` tokens, the last one filled up by rows of zeros.

    Args:
      heads: one for both sides, or the student's and the teacher's; rounded here to the hidden
        states' dtype.
    """
    heads = tuple(head_VD.astype(hidden[0].dtype) for head_VD in heads)
    grad_head_VD = jnp.zeros(heads[0].shape, jnp.float32) if train_head else None
    body = functools.partial(_block, settings, passes, heads, vocabulary)
    count = rows.tokens_T.shape[0]
    blocks = -(-count // block)

    def split(x: jax.Array) -> jax.Array:
        pad = ((0, blocks * block - count), *((0, 0) for _ in x.shape[1:]))
        return jnp.pad(x, pad).reshape(blocks, block, *x.shape[1:])

    grad_head_VD, out = jax.lax.scan(body, grad_head_VD, jax.tree.map(split, (hidden, rows)))
    stats, grad_TD = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)
    return stats, grad_TD, grad_head_VD


def _block(
    settings: divergences.Divergence,
    passes: Passes,
    heads: tuple,
    vocabulary: Vocabulary,
    grad_head_VD: jax.Array | None,
    inputs: tuple,
) -> tuple[jax.Array | None, tuple[divergences.TokenStats, jax.Array]]:
    """The body of the scan over blocks."""
    hidden, rows = inputs
    axis, train_head = vocabulary.axis, grad_head_VD is not None
    here_1 = entries_here(vocabulary)[None]
    local_T = local(rows.tokens_T, vocabulary)
    kept, stats_I8T = passes.logits(here_1, hidden, heads)
    seen, sides = known(settings, stats_I8T, hidden, heads, local_T, axis)
    zeros_T = jnp.zeros_like(seen.logp_T)
    coefficients = passes.coefficients(seen, sides, local_T, zeros_T)
    sums = Sums(*[zeros_T] * 4)
    if two_passes(settings, train_head):
        sums = join(passes.sums(here_1, coefficients, kept), axis)
        coefficients = passes.coefficients(seen, sides, local_T, sums.b_T / sums.p_T)
    head_part = None
    if grad_head_VD is not None:
        factor_T = finish(settings, seen, sums, rows)[1] * rows.weight_T
        head_part = scaled(hidden[0], factor_T), grad_head_VD
    grad_TD, sums_I8T, grad_head_VD = passes.gradient(
        here_1, coefficients, kept, heads[0], head_part
    )
    if sums_I8T is not None:
        sums = join(sums_I8T, axis)
    stats, factor_T = finish(settings, seen, sums, rows)
    grad_TD = total(grad_TD, axis) * (factor_T * rows.weight_T)[:, None]
    return grad_head_VD, (stats, grad_TD.astype(hidden[0].dtype))
