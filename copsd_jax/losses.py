"""The divergence of two streams of hidden states through their heads, dense or in blocks of tokens.

`dense` holds [tokens, vocabulary] arrays and leaves the gradient to automatic differentiation of
the value: the reference for the others. `chunked` walks over blocks of tokens and takes the
gradient in the same sweep from the closed forms of `divergences.py`: three matmuls per block
(student's logits, teacher's logits, gradient of the hidden states), a fourth only if the head
trains, and memory for one block whatever the number of tokens.

`log_probs` gives the log-probabilities of tokens in the same two ways, for the losses that need no
second side. Also the weights with which tokens enter a step's loss (`token_weights`).

Matmuls run in the hidden states' dtype; all else is float32, or float64 for float64 states.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax import divergences

Divergence = divergences.Divergence
TokenStats = divergences.TokenStats


class Rows(NamedTuple):
    """What is known of each token besides its hidden states; constants, [T]."""

    tokens_T: jax.Array
    weight_T: jax.Array
    logp_old_T: jax.Array | None
    logp_rollout_T: jax.Array | None


def divergence(
    hidden_s_TD: jax.Array,
    hidden_t_TD: jax.Array,
    head_s_VD: jax.Array,
    head_t_VD: jax.Array,
    tokens_T: jax.Array,
    weight_T: jax.Array,
    settings: Divergence,
    *,
    implementation: str,
    chunk: int,
    train_head: bool = False,
    logp_old_T: jax.Array | None = None,
    logp_rollout_T: jax.Array | None = None,
    live_T: jax.Array | None = None,
) -> tuple[jax.Array, TokenStats]:
    """Σ_t weight_t · value_t and what is known of each token.

    Differentiable in hidden_s_TD, and in head_s_VD if `train_head`; every other argument, and the
    statistics, are constants to differentiation. Rows of weight 0 contribute exactly nothing,
    whatever they hold (if they are live: any finite numbers). Equal hidden states and heads give
    exactly zero loss and gradient for fkl, rkl and jsd.

    Args:
      hidden_s_TD, hidden_t_TD: states that predict tokens_T, of student and teacher; the matmuls
        run in their dtype and accumulate in float32 or more.
      head_s_VD, head_t_VD: output matrices; may be one array.
      tokens_T: int32, the sampled tokens.
      weight_T: float32; 0 is not a token. It carries the normaliser, see `token_weights`.
      implementation: dense or chunked.
      chunk: tokens per block of `chunked`, at most, over all devices. The block takes its rows
        from all over T, so that a token axis that is sharded stays so.
      logp_old_T, logp_rollout_T: see `divergences.importance`; read only where its clips are on.
      live_T: bool, rows whose statistics are wanted though their weight may be 0; rows of other
        weight are always live. None for those alone.

    Returns:
      The loss, a float32 scalar, and the TokenStats of the T rows, 0 where they are not live.

    Raises:
      ValueError: unknown implementation, shapes that do not fit, top_k above the vocabulary,
        rollout_clip without logp_rollout_T.
    """
    rows = Rows(tokens_T, weight_T, logp_old_T, logp_rollout_T)
    _check(implementation, chunk, (hidden_s_TD, hidden_t_TD), (*rows, live_T))
    _check_heads(head_s_VD, head_t_VD, settings)
    if not train_head:
        head_s_VD = jax.lax.stop_gradient(head_s_VD)
    hidden_t_TD, head_t_VD, rows = jax.lax.stop_gradient((hidden_t_TD, head_t_VD, rows))
    alive_T = rows.weight_T != 0
    if live_T is not None:
        alive_T = alive_T | live_T
    hidden, rows = _only(alive_T, ((hidden_s_TD, hidden_t_TD), _widened(rows, hidden_s_TD)))
    loss, stats = IMPLEMENTATIONS[implementation](
        settings, chunk, train_head, hidden, (head_s_VD, head_t_VD), rows
    )
    return loss, jax.lax.stop_gradient(_only(alive_T, stats))


def _only(alive_T: jax.Array, tree):
    """Arrays [T, ...] with 0 in the rows that are not alive."""

    def mask(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(alive_T, range(1, x.ndim)), x, jnp.zeros((), x.dtype))

    return jax.tree.map(mask, tree)


def _widened(rows: Rows, hidden_TD: jax.Array) -> Rows:
    tokens_T, *others = rows
    return Rows(tokens_T, *jax.tree.map(lambda x: jnp.asarray(x, _wide(hidden_TD)), others))


def _wide(x: jax.Array) -> jnp.dtype:
    """The dtype that sums over x are taken in."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _check(implementation: str, chunk: int, hidden: tuple, per_token: tuple) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}: the choices are {', '.join(IMPLEMENTATIONS)}"
        )
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: it must be at least 1")
    shapes = [x.shape for x in per_token if x is not None]
    if len({*(x.shape[:1] for x in hidden), *shapes}) != 1:
        raise ValueError(
            f"hidden states {[x.shape for x in hidden]} and the arrays per token {shapes} must "
            "agree in their first axis"
        )


def _check_heads(head_s_VD: jax.Array, head_t_VD: jax.Array, settings: Divergence) -> None:
    sizes = head_s_VD.shape[0], head_t_VD.shape[0]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the heads have {sizes[0]} and {sizes[1]} rows: one vocabulary is needed")
    if settings.top_k > sizes[0]:
        raise ValueError(
            f"top_k is {settings.top_k}: the vocabulary has {sizes[0]} entries (0 is off)"
        )


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Matmul of two matrices of one dtype over the named axes, accumulated in float32 or 64."""
    # Without it, accelerators would round float32 operands to fewer bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())),
        precision=precision, preferred_element_type=_wide(a),
    )  # fmt: skip


# --- dense ------------------------------------------------------------------------------------


def _dense(
    settings: Divergence, chunk: int, train_head: bool, hidden: tuple, heads: tuple, rows: Rows
) -> tuple[jax.Array, TokenStats]:
    """All tokens at once; the gradient is automatic differentiation's."""
    del chunk, train_head
    logits_s_TV, logits_t_TV = map(_dense_logits, hidden, heads)
    student = divergences.side(logits_s_TV * (1 / settings.temperature))
    teacher = divergences.side(logits_t_TV * (1 / settings.temperature))
    sampling_T = divergences.log_prob(logits_s_TV, rows.tokens_T, settings.sampling_temperature)
    ratio_T = divergences.importance(sampling_T, rows.logp_old_T, rows.logp_rollout_T, settings)
    value_T, mass_T = divergences.value(logits_s_TV, logits_t_TV, rows.tokens_T, settings)
    stats = TokenStats(
        value_T * ratio_T,
        divergences.pick(student.log, rows.tokens_T),
        divergences.pick(teacher.log, rows.tokens_T),
        sampling_T,
        divergences.entropy(student),
        divergences.entropy(teacher),
        mass_T,
        ratio_T,
    )
    return jnp.sum(rows.weight_T * stats.value_T), stats


def _dense_logits(hidden_TD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Wide copies of rounded operands multiply exactly as the operands themselves."""
    wide = _wide(hidden_TD)
    return _dot(hidden_TD.astype(wide), head_VD.astype(hidden_TD.dtype).astype(wide), 1, 1)


# --- chunked ----------------------------------------------------------------------------------

STRIP = 8  # rows of a block that a CPU works on at a time: their temporaries stay in its cache


def _block(logits_s_TV: jax.Array, logits_t_TV: jax.Array, rows: Rows, settings: Divergence):
    """`divergences.block` in strips."""

    def whole(logits_s_TV, logits_t_TV, rows):
        return divergences.block(
            logits_s_TV, logits_t_TV, rows.tokens_T, settings, rows.logp_old_T, rows.logp_rollout_T
        )

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    settings: Divergence, chunk: int, train_head: bool, hidden: tuple, heads: tuple, rows: Rows
) -> tuple[jax.Array, TokenStats]:
    """The value alone, two matmuls per block; differentiation goes through `_chunked_forward`."""
    del train_head
    heads = _rounded(hidden, heads)

    def body(carry: None, block: tuple) -> tuple[None, TokenStats]:
        logits_s_TV, logits_t_TV = (_dot(x, y, 1, 1) for x, y in zip(block[0], heads, strict=True))
        return carry, _block(logits_s_TV, logits_t_TV, block[1], settings)[0]

    _, stats = jax.lax.scan(body, None, _split((hidden, rows), chunk))
    stats = _join(stats, rows.tokens_T.shape[0])
    return jnp.sum(rows.weight_T * stats.value_T), stats


def _rounded(hidden: tuple, heads: tuple) -> tuple:
    """Heads in the dtype of the states that they meet: once, not in every block."""
    return tuple(head.astype(x.dtype) for x, head in zip(hidden, heads, strict=True))


def _chunked_forward(
    settings: Divergence, chunk: int, train_head: bool, hidden: tuple, heads: tuple, rows: Rows
) -> tuple[tuple[jax.Array, TokenStats], tuple]:
    """Value and gradient in one sweep: three matmuls per block, four if the head trains."""
    head_s_VD, head_t_VD = _rounded(hidden, heads)

    def body(grad_head_VD: jax.Array | None, block: tuple) -> tuple[jax.Array | None, tuple]:
        (hidden_s_TD, hidden_t_TD), rows = block
        logits_s_TV = _dot(hidden_s_TD, head_s_VD, 1, 1)
        logits_t_TV = _dot(hidden_t_TD, head_t_VD, 1, 1)
        stats, dz_TV = _block(logits_s_TV, logits_t_TV, rows, settings)
        # Rounded before the weight, which may be small: bf16 keeps its relative precision anyway.
        dz_TV = dz_TV.astype(hidden_s_TD.dtype)
        grad_hidden_TD = _dot(dz_TV, head_s_VD, 1, 0) * rows.weight_T[:, None]
        if grad_head_VD is not None:
            grad_head_VD = grad_head_VD + _dot(dz_TV, _scale(hidden_s_TD, rows.weight_T), 0, 0)
        return grad_head_VD, (stats, grad_hidden_TD.astype(hidden_s_TD.dtype))

    start = jnp.zeros(head_s_VD.shape, _wide(head_s_VD)) if train_head else None
    grad_head_VD, out = jax.lax.scan(body, start, _split((hidden, rows), chunk))
    stats, grad_hidden_TD = _join(out, rows.tokens_T.shape[0])
    if grad_head_VD is not None:
        grad_head_VD = grad_head_VD.astype(heads[0].dtype)
    return (jnp.sum(rows.weight_T * stats.value_T), stats), (grad_hidden_TD, grad_head_VD)


def _scale(x_TD: jax.Array, by: jax.Array) -> jax.Array:
    """x times one number, or one a row, rounded once."""
    by = jnp.expand_dims(by, range(by.ndim, x_TD.ndim)) if by.ndim else by
    return (x_TD.astype(_wide(x_TD)) * by).astype(x_TD.dtype)


def _chunked_backward(
    settings: Divergence, chunk: int, train_head: bool, residuals: tuple, cotangents: tuple
) -> tuple:
    """Scales the gradient that the forward sweep has taken; None is a zero cotangent."""
    del settings, chunk, train_head
    grad_hidden_TD, grad_head_VD = jax.tree.map(
        lambda grad: _scale(grad, cotangents[0].astype(_wide(grad))), residuals
    )
    return (grad_hidden_TD, None), (grad_head_VD, None), None


_chunked.defvjp(_chunked_forward, _chunked_backward)

IMPLEMENTATIONS: dict[str, Callable] = {"dense": _dense, "chunked": _chunked}


def _block_sizes(tokens: int, chunk: int) -> tuple[int, int]:
    """(blocks, rows of a block): as few blocks as `chunk` allows, evenly filled, in whole strips.

    T = 10, chunk 4 -> 3 blocks of 4: rows 0 3 6 9, 1 4 7 pad, 2 5 8 pad.
    """
    blocks = max(1, -(-tokens // chunk))
    size = -(-tokens // blocks)
    return blocks, size if size <= STRIP else -(-size // STRIP) * STRIP


def _split(rows: tuple, chunk: int) -> tuple:
    """[T, ...] -> [blocks, rows, ...], padded by zeros; row r of block i is token r · blocks + i.

    The row axis is the major part of T: where T is sharded, each device's rows of every block are
    tokens that it holds already.
    """

    def split(x: jax.Array) -> jax.Array:
        blocks, size = _block_sizes(x.shape[0], chunk)
        pad = ((0, blocks * size - x.shape[0]), *((0, 0) for _ in x.shape[1:]))
        return jnp.moveaxis(jnp.pad(x, pad).reshape(size, blocks, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, rows)


def _join(out: tuple, tokens: int):
    """The inverse of `_split`."""

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:tokens]

    return jax.tree.map(join, out)


# --- log-probabilities of given tokens ----------------------------------------------------------


def log_probs(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    tokens_T: jax.Array,
    *,
    temperature: float,
    implementation: str,
    chunk: int,
    train_head: bool = False,
    live_T: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """ln softmax(logits / temperature)[token] and the distribution's entropy, in nats.

    The first is differentiable in hidden_TD, and in head_VD if `train_head`; the second is a
    constant. `chunked` takes one matmul per block for the values, two with the gradient (the
    gradient of each token to its own hidden state is taken in the forward sweep and scaled in the
    backward), and four with the head's, for which the logits are computed again.

    Args:
      hidden_TD, head_VD, tokens_T, implementation, chunk: as in `divergence`.
      live_T: bool; other rows give 0 and have no gradient, whatever they hold. None for all.

    Returns:
      logp_T and entropy_T, float32.

    Raises:
      ValueError: unknown implementation, shapes that do not fit, temperature not above 0.
    """
    _check(implementation, chunk, (hidden_TD,), (tokens_T, live_T))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
    if not train_head:
        head_VD = jax.lax.stop_gradient(head_VD)
    if live_T is None:
        live_T = jnp.ones(tokens_T.shape, bool)
    logp_T, entropy_T = LOG_PROBS[implementation](
        temperature, chunk, train_head, _only(live_T, hidden_TD), head_VD, tokens_T
    )
    return _only(live_T, logp_T), jax.lax.stop_gradient(_only(live_T, entropy_T))


def _dense_log_probs(temperature, chunk, train_head, hidden_TD, head_VD, tokens_T):
    del chunk, train_head
    whole = divergences.side(_dense_logits(hidden_TD, head_VD) * (1 / temperature))
    return divergences.pick(whole.log, tokens_T), divergences.entropy(whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked_log_probs(temperature, chunk, train_head, hidden_TD, head_VD, tokens_T):
    """Values alone, one matmul per block."""
    del train_head
    return _log_prob_sweep(temperature, chunk, False, hidden_TD, head_VD, tokens_T)[:2]


def _log_prob_sweep(temperature, chunk, gradient, hidden_TD, head_VD, tokens_T) -> tuple:
    """logp_T, entropy_T and, if wanted, grad_TD: ∂logp_t / ∂hidden_t."""
    head_VD = head_VD.astype(hidden_TD.dtype)
    score = functools.partial(divergences.score, temperature=temperature)

    def body(carry: None, block: tuple) -> tuple[None, tuple]:
        *values, dz_TV = _in_strips(score, _dot(block[0], head_VD, 1, 1), block[1])
        if gradient:
            values.append(_dot(dz_TV.astype(head_VD.dtype), head_VD, 1, 0).astype(head_VD.dtype))
        return carry, tuple(values)

    return _join(jax.lax.scan(body, None, _split((hidden_TD, tokens_T), chunk))[1], len(tokens_T))


def _log_probs_forward(temperature, chunk, train_head, hidden_TD, head_VD, tokens_T):
    values = _log_prob_sweep(temperature, chunk, True, hidden_TD, head_VD, tokens_T)
    return values[:2], (values[2], (hidden_TD, head_VD, tokens_T) if train_head else None)


def _log_probs_backward(temperature, chunk, train_head, residuals, cotangents) -> tuple:
    """The head's gradient is a sum over tokens, which needs their cotangents: a second sweep."""
    grad_TD, again = residuals
    grad_TD = _scale(grad_TD, cotangents[0])
    if not train_head:
        return grad_TD, None, None
    hidden_TD, head_VD, tokens_T = again
    rounded_VD = head_VD.astype(hidden_TD.dtype)
    score = functools.partial(divergences.score, temperature=temperature)

    def body(grad_head_VD: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        hidden_TD, tokens_T, cotangent_T = inputs
        dz_TV = _in_strips(score, _dot(hidden_TD, rounded_VD, 1, 1), tokens_T)[2]
        scaled_TD = _scale(hidden_TD, cotangent_T)
        return grad_head_VD + _dot(dz_TV.astype(hidden_TD.dtype), scaled_TD, 0, 0), None

    start = jnp.zeros(head_VD.shape, _wide(hidden_TD))
    grad_head_VD, _ = jax.lax.scan(body, start, _split((hidden_TD, tokens_T, cotangents[0]), chunk))
    return grad_TD, grad_head_VD.astype(head_VD.dtype), None


_chunked_log_probs.defvjp(_log_probs_forward, _log_probs_backward)

LOG_PROBS: dict[str, Callable] = {"dense": _dense_log_probs, "chunked": _chunked_log_probs}


# --- weights ----------------------------------------------------------------------------------


def token_weights(
    mask_BC: jax.Array, norm: str, micro_batch: int = 0, length: int = 0
) -> jax.Array:
    """The weight of every token of an optimizer step, so that micro-batch losses simply add up.

    Call it once on the mask of the whole step and slice the result by micro-batches: the sum of
    Σ weight · value over them is

      micro_token_mean: the mean over micro-batches of the token mean inside each (the reference;
        a micro-batch weighs the same whatever its number of tokens, an empty one counts as 0);
      global_token_mean: the token mean of the step, whatever the micro-batches (DAPO);
      seq_mean: the mean over completions of their token means. Completions without a token are
        not counted, so padding rows change nothing;
      seq_mean_all: the same over all B, those without a token as 0 (GRPO 1/B Σ_i 1/|o_i|, and SDPO
        with micro-batches of one), so padding rows must not be in the mask;
      constant: Σ / (B · length), the divisor of Dr. GRPO, over all B as well.

    Every count is clamped to at least 1: an empty mask gives zeros, not NaN.

    Args:
      mask_BC: 1 or True for completion tokens that count, B completions in the order in which
        they are cut into micro-batches of consecutive rows.
      micro_batch: completions per micro-batch, all devices together; 0 for B.
      length: of `constant`, tokens: the longest completion that may be sampled.

    Returns:
      weight_BC: float32.

    Raises:
      ValueError: unknown norm; micro_batch does not divide B; constant without a length.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}: the choices are {', '.join(NORMS)}")
    micro_batch = micro_batch or mask_BC.shape[0]
    if micro_batch < 1 or mask_BC.shape[0] % micro_batch:
        raise ValueError(
            f"micro_batch is {micro_batch}: it must divide the {mask_BC.shape[0]} completions"
        )
    if norm == "constant" and length < 1:
        raise ValueError(f"norm is 'constant' and length {length}: it must be at least 1")
    mask_BC = jnp.asarray(mask_BC).astype(jnp.float32)
    return mask_BC / NORMS[norm](mask_BC, micro_batch, length)


def _micro_token_mean(mask_BC: jax.Array, micro_batch: int, _: int) -> jax.Array:
    micros = mask_BC.shape[0] // micro_batch
    count_G = jnp.sum(mask_BC.reshape(micros, -1), axis=1)
    return jnp.repeat(micros * jnp.maximum(count_G, 1), micro_batch)[:, None]


def _global_token_mean(mask_BC: jax.Array, *_: int) -> jax.Array:
    return jnp.maximum(jnp.sum(mask_BC), 1)


def _seq_mean(mask_BC: jax.Array, *_: int) -> jax.Array:
    count_B1 = jnp.sum(mask_BC, axis=1, keepdims=True)
    completions = jnp.sum((count_B1 > 0).astype(jnp.float32))
    return jnp.maximum(count_B1, 1) * jnp.maximum(completions, 1)


def _seq_mean_all(mask_BC: jax.Array, *_: int) -> jax.Array:
    return jnp.maximum(jnp.sum(mask_BC, axis=1, keepdims=True), 1) * max(mask_BC.shape[0], 1)


def _constant(mask_BC: jax.Array, _: int, length: int) -> jax.Array:
    return jnp.full((), max(mask_BC.shape[0], 1) * length, jnp.float32)


NORMS: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
    "micro_token_mean": _micro_token_mean,
    "global_token_mean": _global_token_mean,
    "seq_mean": _seq_mean,
    "seq_mean_all": _seq_mean_all,
    "constant": _constant,
}
