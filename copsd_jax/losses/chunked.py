"""A block of tokens against the vocabulary in plain array code: statistics and gradient at once.

`sweep` is the block's divergence, `score` the log-probabilities of its tokens. Matmuls run in the
hidden states' dtype; all else is float32, or float64 for float64 states.

Inside `jax.shard_map` a head may be one part of a vocabulary that a mesh axis splits. What travels
for a block of T rows is then, per side, the row maxima (T); sums of exponentials, of exponentials
times logarithms, and the sampled logits (7 T together); the sums of e, b and the clipped mass
(3 T); and one sum of the gradient to the hidden states (T D).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import divergences, token_blocks

STRIP = 8  # rows of a block that a CPU works on at a time: their temporaries stay in its cache
FLOOR = -1e30  # logits of padding: no mass, and finite


class Shard(NamedTuple):
    """A device's part of the vocabulary: equal parts in the order of a mesh axis.

    Attributes:
      axis: the mesh axis; None if every device has all of it.
      entries: of the whole vocabulary; what lies behind them is padding.
    """

    axis: str | None
    entries: int


def wide(x: jax.Array) -> jnp.dtype:
    """The dtype that sums over x are taken in."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Matmul of two matrices of one dtype over the named axes, accumulated in float32 or 64."""
    # Without it, accelerators would round float32 operands to fewer bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())),
        precision=precision, preferred_element_type=wide(a),
    )  # fmt: skip


def scale(x_TD: jax.Array, by: jax.Array) -> jax.Array:
    """x times one number, or one a row, rounded once."""
    by = jnp.expand_dims(by, range(by.ndim, x_TD.ndim)) if by.ndim else by
    return (x_TD.astype(wide(x_TD)) * by).astype(x_TD.dtype)


# --- divergence -------------------------------------------------------------------------------


class Swept(NamedTuple):
    """Statistics of a block, ∂(Σ weight · value) / ∂hidden, and the same to the student's head."""

    stats: divergences.TokenStats
    grad_hidden_TD: jax.Array | None
    grad_head_VD: jax.Array | None


def sweep(
    settings: divergences.Divergence,
    hidden_s_TD: jax.Array,
    hidden_t_TD: jax.Array,
    head_s_VD: jax.Array,
    head_t_VD: jax.Array,
    tokens_T: jax.Array,
    weight_T: jax.Array,
    logp_old_T: jax.Array | None,
    logp_rollout_T: jax.Array | None,
    *,
    gradient: bool,
    train_head: bool,
    shard: Shard,
) -> Swept:
    """Three matmuls: both logits, the gradient to the states; a fourth for the head's gradient.

    Args:
      hidden_s_TD, hidden_t_TD, head_s_VD, head_t_VD: each head in its states' dtype.
      tokens_T: int32, ids of the whole vocabulary.
      weight_T: of each row's value in the sum whose gradient is taken.
      gradient: False for the statistics alone, two matmuls.
    """
    logits_s_TV = _logits(hidden_s_TD, head_s_VD, shard)
    logits_t_TV = _logits(hidden_t_TD, head_t_VD, shard)
    rows = (tokens_T, logp_old_T, logp_rollout_T)
    if shard.axis:
        stats, dz_TV = _split_block(logits_s_TV, logits_t_TV, rows, settings, shard.axis)
    else:
        stats, dz_TV = _block(logits_s_TV, logits_t_TV, rows, settings)
    if not gradient:
        return Swept(stats, None, None)
    grads = _gradients(dz_TV, hidden_s_TD, head_s_VD, weight_T, train_head)
    grad_hidden_TD, grad_head_VD = grads
    if shard.axis:
        grad_hidden_TD = jax.lax.psum(grad_hidden_TD, shard.axis)
    grad_hidden_TD = (grad_hidden_TD * weight_T[:, None]).astype(hidden_s_TD.dtype)
    return Swept(stats, grad_hidden_TD, grad_head_VD)


def device(
    chunk: int,
    settings: divergences.Divergence,
    hidden: tuple[jax.Array, jax.Array],
    rows: tuple,
    live_T: jax.Array,
    heads: tuple[jax.Array, ...],
    *,
    gradient: bool,
    train_head: bool,
    vocab_axis: str | None,
    vocab_size: int,
) -> tuple[tuple, jax.Array | None]:
    """A device's live rows in blocks of at most `chunk`; all else as `dispatch.device`
    has it."""

    def block(inputs: tuple) -> tuple:
        hidden, rows = inputs
        args: Any = (*hidden, heads[0], heads[-1], *rows)
        out = sweep(
            settings, *args, gradient=gradient, train_head=train_head,
            shard=Shard(vocab_axis, vocab_size),
        )  # fmt: skip
        return (out.stats, out.grad_hidden_TD), out.grad_head_VD

    return token_blocks.walk(block, (hidden, rows), live_T, chunk, STRIP)


def _logits(hidden_TD: jax.Array, head_VD: jax.Array, shard: Shard) -> jax.Array:
    logits_TV = dot(hidden_TD, head_VD, 1, 1)
    count = head_VD.shape[0]
    if shard.axis is None or shard.entries == count * jax.lax.axis_size(shard.axis):
        return logits_TV
    entry_1V = _first(shard.axis, count) + jnp.arange(count, dtype=jnp.int32)[None]
    return jnp.where(entry_1V < shard.entries, logits_TV, FLOOR)


def _first(axis: str, count: int) -> jax.Array:
    """The first entry of a device's part."""
    return jax.lax.axis_index(axis).astype(jnp.int32) * count


def _gradients(dz_TV, hidden_TD, head_VD, weight_T, train_head) -> tuple:
    """dz · head, not yet weighted, and (weight dz)ᵀ · hidden, both wide.

    dz is rounded before the weight, which may be small: bf16 keeps its relative precision anyway.
    """
    dz_TV = dz_TV.astype(hidden_TD.dtype)
    grad_head_VD = dot(dz_TV, scale(hidden_TD, weight_T), 0, 0) if train_head else None
    return dot(dz_TV, head_VD, 1, 0), grad_head_VD


def _block(logits_s_TV: jax.Array, logits_t_TV: jax.Array, rows: tuple, settings):
    """`divergences.block` in strips."""

    def whole(logits_s_TV, logits_t_TV, rows):
        tokens_T, *others = rows
        return divergences.block(logits_s_TV, logits_t_TV, tokens_T, settings, *others)

    return _in_strips(whole, logits_s_TV, logits_t_TV, rows)


def _in_strips(whole: Callable, *rows: Any):
    """whole(*rows) on arrays [rows, ...]; on a CPU strip by strip, chosen where it runs."""
    if jax.tree.leaves(rows)[0].shape[0] <= STRIP:
        return whole(*rows)

    def strips(*rows: Any):
        cut = jax.tree.map(lambda x: x.reshape(-1, STRIP, *x.shape[1:]), rows)
        out = jax.lax.map(lambda strip: whole(*strip), cut)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return jax.lax.platform_dependent(*rows, cpu=strips, default=whole)


# --- a vocabulary in parts --------------------------------------------------------------------


def _tops(logits: list[jax.Array], axis: str) -> list[jax.Array]:
    """Row maxima over the whole vocabulary, [T, 1] each, in one exchange."""
    tops = jax.lax.pmax(jnp.stack([jnp.max(x_TV, axis=1) for x_TV in logits]), axis)
    return [top_T[:, None] for top_T in tops]


def _own(x_TV: jax.Array, tokens_T: jax.Array, axis: str) -> jax.Array:
    """x[t, token] where the token lies in this part, else 0."""
    count = x_TV.shape[1]
    local_T = tokens_T - _first(axis, count)
    here_T = (local_T >= 0) & (local_T < count)
    return jnp.where(here_T, divergences.pick(x_TV, jnp.clip(local_T, 0, count - 1)), 0)


def _sum(sums: list[jax.Array], axis: str) -> list[jax.Array]:
    """Sums [T] over all parts, in one exchange."""
    return list(jax.lax.psum(jnp.stack(sums), axis))


def _side(x_TV: jax.Array, weights_TV: jax.Array, total_T: jax.Array) -> divergences.Side:
    """From x = (logits - top) / τ, its exponential, and their sum over the whole vocabulary."""
    total_T1 = total_T[:, None]
    return divergences.Side(weights_TV * (1 / total_T1), x_TV - jnp.log(total_T1))


def _misses(student: divergences.Side, tokens_T: jax.Array, axis: str) -> jax.Array:
    """p - 1[y] on this part."""
    count = student.p.shape[1]
    local_T1 = (tokens_T - _first(axis, count))[:, None]
    return student.p - (jnp.arange(count, dtype=jnp.int32)[None] == local_T1).astype(
        student.p.dtype
    )


def _split_block(logits_s_TV, logits_t_TV, rows: tuple, settings, axis: str) -> tuple:
    """`divergences.block` where each device has a part of the vocabulary; no top-k."""
    tokens_T, logp_old_T, logp_rollout_T = rows
    factor, sampling = 1 / settings.temperature, 1 / settings.sampling_temperature
    top_s_T1, top_t_T1 = _tops([logits_s_TV, logits_t_TV], axis)
    below_TV = logits_s_TV - top_s_T1
    x_s_TV, x_t_TV = below_TV * factor, (logits_t_TV - top_t_T1) * factor
    w_s_TV, w_t_TV = jnp.exp(x_s_TV), jnp.exp(x_t_TV)
    over_V = lambda x_TV: jnp.sum(x_TV, axis=1)  # noqa: E731
    total_s_T, total_t_T, total_y_T, log_s_T, log_t_T, y_s_T, y_t_T = _sum(
        [over_V(w_s_TV), over_V(w_t_TV), over_V(jnp.exp(below_TV * sampling)),
         over_V(w_s_TV * x_s_TV), over_V(w_t_TV * x_t_TV),
         _own(below_TV, tokens_T, axis), _own(x_t_TV, tokens_T, axis)], axis,
    )  # fmt: skip
    student, teacher = _side(x_s_TV, w_s_TV, total_s_T), _side(x_t_TV, w_t_TV, total_t_T)
    logp_T = y_s_T * factor - jnp.log(total_s_T)
    logq_T = y_t_T - jnp.log(total_t_T)
    sampling_T = y_s_T * sampling - jnp.log(total_y_T)
    if settings.divergence == "sampled":
        advantage_T = logq_T - logp_T
        value_T, mass_T = -advantage_T * logp_T, jnp.zeros_like(logp_T)
        dz_TV = advantage_T[:, None] * _misses(student, tokens_T, axis)
    else:
        e_TV, b_TV, clipped_TV = divergences.entries(student, teacher, settings)
        q_TV = jnp.zeros_like(e_TV) if clipped_TV is None else jnp.where(clipped_TV, teacher.p, 0)
        d_T, b_T, mass_T = _sum([over_V(e_TV), over_V(b_TV), over_V(q_TV)], axis)
        value_T, factor_T = divergences.token_clip(d_T, settings)
        dz_TV = (b_TV - student.p * b_T[:, None]) * factor_T[:, None]
        if clipped_TV is None:
            mass_T = divergences.clipped_mass(d_T, None, teacher, settings)
    ratio_T = divergences.importance(sampling_T, logp_old_T, logp_rollout_T, settings)
    stats = divergences.TokenStats(
        value_T * ratio_T, logp_T, logq_T, sampling_T,
        jnp.log(total_s_T) - log_s_T / total_s_T, jnp.log(total_t_T) - log_t_T / total_t_T,
        mass_T, ratio_T,
    )  # fmt: skip
    return stats, dz_TV * (factor * ratio_T)[:, None]


# --- log-probabilities ------------------------------------------------------------------------


def score(
    temperature: float,
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    tokens_T: jax.Array,
    cotangent_T: jax.Array | None = None,
    *,
    gradient: bool,
    shard: Shard,
) -> tuple[tuple, jax.Array | None]:
    """Of a block: (logp_T, entropy_T, ∂logp_t / ∂hidden_t) and the head's gradient.

    Args:
      head_VD: in the states' dtype.
      cotangent_T: of logp_T: what the head's gradient is a sum of, and all that is wanted then.
      gradient: whether the third is wanted.
    """
    logits_TV = _logits(hidden_TD, head_VD, shard)
    if shard.axis:
        logp_T, entropy_T, dz_TV = _split_score(logits_TV, tokens_T, temperature, shard.axis)
    else:
        whole = lambda *rows: divergences.score(*rows, temperature=temperature)  # noqa: E731
        logp_T, entropy_T, dz_TV = _in_strips(whole, logits_TV, tokens_T)
    dz_TV = dz_TV.astype(hidden_TD.dtype)
    if cotangent_T is not None:
        return (), dot(dz_TV, scale(hidden_TD, cotangent_T), 0, 0)
    if not gradient:
        return (logp_T, entropy_T), None
    grad_TD = dot(dz_TV, head_VD, 1, 0)
    grad_TD = jax.lax.psum(grad_TD, shard.axis) if shard.axis else grad_TD
    return (logp_T, entropy_T, grad_TD.astype(hidden_TD.dtype)), None


def _split_score(logits_TV, tokens_T, temperature: float, axis: str) -> tuple:
    """`divergences.score` where each device has a part of the vocabulary."""
    factor = 1 / temperature
    x_TV = (logits_TV - _tops([logits_TV], axis)[0]) * factor
    weights_TV = jnp.exp(x_TV)
    total_T, log_T, y_T = _sum(
        [jnp.sum(weights_TV, axis=1), jnp.sum(weights_TV * x_TV, axis=1),
         _own(x_TV, tokens_T, axis)], axis,
    )  # fmt: skip
    log_total_T = jnp.log(total_T)
    dz_TV = _misses(_side(x_TV, weights_TV, total_T), tokens_T, axis) * -factor
    return y_T - log_total_T, log_total_T - log_T / total_T, dz_TV


def _score(static: tuple, gradient: bool, hidden_TD, head_VD, rows: tuple, live_T) -> tuple:
    """`score` of all live rows, over the whole mesh."""
    temperature, chunk, train_head = static
    entries = head_VD.shape[0]

    def device(inputs: tuple, heads: tuple, axis: str | None) -> tuple:
        *rows, live_T = inputs

        def block(rows: tuple) -> tuple:
            hidden_TD, *rest = rows
            shard = Shard(axis, entries)
            return score(temperature, hidden_TD, heads[0], *rest, gradient=gradient, shard=shard)

        return token_blocks.walk(block, tuple(rows), live_T, chunk, STRIP)

    heads = (head_VD.astype(hidden_TD.dtype),)
    if train_head:  # a frozen one was gathered ahead
        heads = (token_blocks.divided(heads[0], split_vocabulary=True),)
    inputs = (hidden_TD, *rows, live_T)
    return token_blocks.spread(device, inputs, heads, split_vocabulary=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scored(static: tuple, hidden_TD, head_VD, tokens_T, live_T) -> tuple[jax.Array, jax.Array]:
    """logp_T and entropy_T of the live rows; see `divergence_loss.log_probs`.

    Args:
      static: temperature, rows of a block, whether the head trains.
    """
    return _score(static, False, hidden_TD, head_VD, (tokens_T,), live_T)[0]


def _scored_forward(static: tuple, hidden_TD, head_VD, tokens_T, live_T) -> tuple:
    *values, grad_TD = _score(static, True, hidden_TD, head_VD, (tokens_T,), live_T)[0]
    return tuple(values), (grad_TD, (hidden_TD, head_VD, tokens_T, live_T) if static[2] else None)


def _scored_backward(static: tuple, residuals: tuple, cotangents: tuple) -> tuple:
    """The head's gradient is a sum over tokens, which needs their cotangents: a second sweep."""
    grad_TD, again = residuals
    grad_TD = scale(grad_TD, cotangents[0])
    if again is None:
        return grad_TD, None, None, None
    hidden_TD, head_VD, tokens_T, live_T = again
    rows = (tokens_T, cotangents[0])
    grad_head_VD = _score(static, True, hidden_TD, head_VD, rows, live_T)[1]
    return grad_TD, grad_head_VD.astype(head_VD.dtype), None, None


scored.defvjp(_scored_forward, _scored_backward)
