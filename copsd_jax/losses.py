"""The divergence of two streams of hidden states through their heads, dense or in blocks of tokens.

`dense` holds [tokens, vocabulary] arrays and leaves the gradient to automatic differentiation of
the value: the reference for the others. `chunked` walks over blocks of tokens and takes the
gradient in the same sweep from the closed forms of `divergences.py`: three matmuls per block
(student's logits, teacher's logits, gradient of the hidden states), a fourth only if the head
trains, and memory for one block whatever the number of tokens.

Also the weights with which tokens enter a step's loss (`token_weights`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from copsd_jax import divergences

Divergence = divergences.Divergence
TokenStats = divergences.TokenStats


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
) -> tuple[jax.Array, TokenStats]:
    """Σ_t weight_t · value_t and what is known of each token.

    Differentiable in hidden_s_TD, and in head_s_VD if `train_head`; every other argument, and the
    statistics, are constants to differentiation. Rows of weight 0 contribute exactly nothing,
    whatever they hold. Equal hidden states and heads give exactly zero loss and gradient for
    fkl, rkl and jsd.

    Args:
      hidden_s_TD, hidden_t_TD: states that predict tokens_T, of student and teacher; the matmuls
        run in their dtype and accumulate in float32.
      head_s_VD, head_t_VD: output matrices; may be one array.
      tokens_T: int32, the sampled tokens.
      weight_T: float32; 0 is not a token. It carries the normaliser, see `token_weights`.
      implementation: dense or chunked.
      chunk: tokens per block of `chunked`, at most, over all devices. The block takes its rows
        from all over T, so that a token axis that is sharded stays so.

    Returns:
      The loss, a float32 scalar, and the TokenStats of the T rows.

    Raises:
      ValueError: unknown implementation, shapes that do not fit, top_k above the vocabulary.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}: the choices are {', '.join(IMPLEMENTATIONS)}"
        )
    _check(hidden_s_TD, hidden_t_TD, head_s_VD, head_t_VD, tokens_T, weight_T, settings, chunk)
    if not train_head:
        head_s_VD = jax.lax.stop_gradient(head_s_VD)
    hidden_t_TD, head_t_VD, weight_T = jax.lax.stop_gradient((hidden_t_TD, head_t_VD, weight_T))
    live_T1 = (weight_T != 0)[:, None]
    hidden_s_TD = jnp.where(live_T1, hidden_s_TD, jnp.zeros((), hidden_s_TD.dtype))
    hidden_t_TD = jnp.where(live_T1, hidden_t_TD, jnp.zeros((), hidden_t_TD.dtype))
    loss, stats = IMPLEMENTATIONS[implementation](
        settings, chunk, train_head,
        hidden_s_TD, hidden_t_TD, head_s_VD, head_t_VD, tokens_T, weight_T,
    )  # fmt: skip
    stats = jax.tree.map(lambda x_T: jnp.where(weight_T != 0, x_T, 0), stats)
    return loss, jax.lax.stop_gradient(stats)


def _check(hidden_s, hidden_t, head_s, head_t, tokens, weight, settings, chunk) -> None:
    if len({hidden_s.shape[:1], hidden_t.shape[:1], tokens.shape, weight.shape}) != 1:
        raise ValueError(
            f"hidden states {hidden_s.shape} and {hidden_t.shape}, tokens {tokens.shape} and "
            f"weights {weight.shape} must agree in their first axis"
        )
    if head_s.shape[0] != head_t.shape[0]:
        raise ValueError(
            f"the heads have {head_s.shape[0]} and {head_t.shape[0]} rows: one vocabulary is needed"
        )
    if settings.top_k > head_s.shape[0]:
        raise ValueError(
            f"top_k is {settings.top_k}: the vocabulary has {head_s.shape[0]} entries (0 is off)"
        )
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: it must be at least 1")


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Matmul of two matrices of one dtype over the named axes, accumulated in float32."""
    # Without it, accelerators would round float32 operands to fewer bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip


# --- dense ------------------------------------------------------------------------------------


def _dense(
    settings: Divergence,
    chunk: int,
    train_head: bool,
    hidden_s_TD: jax.Array,
    hidden_t_TD: jax.Array,
    head_s_VD: jax.Array,
    head_t_VD: jax.Array,
    tokens_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, TokenStats]:
    """All tokens at once; the gradient is automatic differentiation's."""
    del chunk, train_head
    # float32 copies of rounded operands multiply exactly as the operands themselves
    logits_s_TV = _dot(hidden_s_TD.astype(jnp.float32), _as(head_s_VD, hidden_s_TD), 1, 1)
    logits_t_TV = _dot(hidden_t_TD.astype(jnp.float32), _as(head_t_VD, hidden_t_TD), 1, 1)
    value_T, mass_T = _dense_value(logits_s_TV, logits_t_TV, tokens_T, settings)
    student = divergences.side(logits_s_TV * (1 / settings.temperature))
    teacher = divergences.side(logits_t_TV * (1 / settings.temperature))
    stats = TokenStats(
        value_T,
        divergences.pick(student.log, tokens_T),
        divergences.pick(teacher.log, tokens_T),
        divergences.log_prob(logits_s_TV, tokens_T, settings.sampling_temperature),
        divergences.entropy(student),
        divergences.entropy(teacher),
        mass_T,
    )
    return jnp.sum(weight_T * value_T), stats


def _as(head_VD: jax.Array, hidden_TD: jax.Array) -> jax.Array:
    return head_VD.astype(hidden_TD.dtype).astype(jnp.float32)


def _dense_value(
    logits_s_TV: jax.Array, logits_t_TV: jax.Array, tokens_T: jax.Array, settings: Divergence
) -> tuple[jax.Array, jax.Array]:
    """Value and clipped mass of each token, [T]."""
    if settings.top_k:
        best_TK = jax.lax.top_k(logits_t_TV, settings.top_k)[1]
        logits_s_TV = jnp.take_along_axis(logits_s_TV, best_TK, axis=1)
        logits_t_TV = jnp.take_along_axis(logits_t_TV, best_TK, axis=1)
    student = divergences.side(logits_s_TV * (1 / settings.temperature))
    teacher = divergences.side(logits_t_TV * (1 / settings.temperature))
    if settings.divergence == "sampled":
        logp_T = divergences.pick(student.log, tokens_T)
        advantage_T = jax.lax.stop_gradient(divergences.pick(teacher.log, tokens_T) - logp_T)
        return -advantage_T * logp_T, jnp.zeros_like(logp_T)
    # A shifted entry has its minimum at p = q: its derivative there is 0, rounding apart.
    equal_TK = student.p == teacher.p
    student = jax.tree.map(lambda x: jnp.where(equal_TK, jax.lax.stop_gradient(x), x), student)
    e_TK, _, clipped_TK = divergences.entries(student, teacher, settings)
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
    return value_T, divergences.clipped_mass(d_T, clipped_TK, teacher, settings)


# --- chunked ----------------------------------------------------------------------------------

STRIP = 8  # rows of a block that a CPU works on at a time: their temporaries stay in its cache


def _block(
    logits_s_TV: jax.Array, logits_t_TV: jax.Array, tokens_T: jax.Array, settings: Divergence
) -> tuple[TokenStats, jax.Array]:
    """`divergences.block`, on a CPU strip by strip; the choice falls where the program runs."""
    rows = (logits_s_TV, logits_t_TV, tokens_T)
    whole = functools.partial(divergences.block, settings=settings)
    if tokens_T.shape[0] <= STRIP:
        return whole(*rows)

    def strips(*rows: jax.Array) -> tuple[TokenStats, jax.Array]:
        cut = jax.tree.map(lambda x: x.reshape(-1, STRIP, *x.shape[1:]), rows)
        out = jax.lax.map(lambda strip: whole(*strip), cut)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return jax.lax.platform_dependent(*rows, cpu=strips, default=whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(
    settings: Divergence,
    chunk: int,
    train_head: bool,
    hidden_s_TD: jax.Array,
    hidden_t_TD: jax.Array,
    head_s_VD: jax.Array,
    head_t_VD: jax.Array,
    tokens_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, TokenStats]:
    """The value alone, two matmuls per block; differentiation goes through `_chunked_forward`."""
    del train_head

    def body(carry: None, rows: tuple) -> tuple[None, TokenStats]:
        hidden_s_TD, hidden_t_TD, tokens_T = rows
        logits_s_TV = _dot(hidden_s_TD, head_s_VD, 1, 1)
        logits_t_TV = _dot(hidden_t_TD, head_t_VD, 1, 1)
        return carry, _block(logits_s_TV, logits_t_TV, tokens_T, settings)[0]

    head_s_VD, head_t_VD = head_s_VD.astype(hidden_s_TD.dtype), head_t_VD.astype(hidden_t_TD.dtype)
    rows = (hidden_s_TD, hidden_t_TD, tokens_T)
    _, stats = jax.lax.scan(body, None, _split(rows, chunk))
    stats = _join(stats, tokens_T.shape[0])
    return jnp.sum(weight_T * stats.value_T), stats


def _chunked_forward(
    settings: Divergence,
    chunk: int,
    train_head: bool,
    hidden_s_TD: jax.Array,
    hidden_t_TD: jax.Array,
    head_s_VD: jax.Array,
    head_t_VD: jax.Array,
    tokens_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[tuple[jax.Array, TokenStats], tuple]:
    """Value and gradient in one sweep: three matmuls per block, four if the head trains."""

    def body(grad_head_VD: jax.Array | None, rows: tuple) -> tuple[jax.Array | None, tuple]:
        hidden_s_TD, hidden_t_TD, tokens_T, weight_T = rows
        logits_s_TV = _dot(hidden_s_TD, head_s_VD, 1, 1)
        logits_t_TV = _dot(hidden_t_TD, head_t_VD, 1, 1)
        stats, dz_TV = _block(logits_s_TV, logits_t_TV, tokens_T, settings)
        # Rounded before the weight, which may be small: bf16 keeps its relative precision anyway.
        dz_TV = dz_TV.astype(hidden_s_TD.dtype)
        grad_hidden_TD = _dot(dz_TV, head_s_VD, 1, 0) * weight_T[:, None]
        if grad_head_VD is not None:
            grad_head_VD = grad_head_VD + _dot(dz_TV, _scale(hidden_s_TD, weight_T), 0, 0)
        return grad_head_VD, (stats, grad_hidden_TD.astype(hidden_s_TD.dtype))

    head_dtype = head_s_VD.dtype
    # once, not in every block
    head_s_VD, head_t_VD = head_s_VD.astype(hidden_s_TD.dtype), head_t_VD.astype(hidden_t_TD.dtype)
    rows = (hidden_s_TD, hidden_t_TD, tokens_T, weight_T)
    start = jnp.zeros(head_s_VD.shape, jnp.float32) if train_head else None
    grad_head_VD, out = jax.lax.scan(body, start, _split(rows, chunk))
    stats, grad_hidden_TD = _join(out, tokens_T.shape[0])
    if grad_head_VD is not None:
        grad_head_VD = grad_head_VD.astype(head_dtype)
    return (jnp.sum(weight_T * stats.value_T), stats), (grad_hidden_TD, grad_head_VD)


def _scale(hidden_TD: jax.Array, weight_T: jax.Array) -> jax.Array:
    return (hidden_TD.astype(jnp.float32) * weight_T[:, None]).astype(hidden_TD.dtype)


def _chunked_backward(
    settings: Divergence, chunk: int, train_head: bool, residuals: tuple, cotangents: tuple
) -> tuple:
    """Scales the gradient that the forward sweep has taken; None is a zero cotangent."""
    del settings, chunk, train_head
    grad_hidden_TD, grad_head_VD = jax.tree.map(
        lambda grad: (cotangents[0] * grad.astype(jnp.float32)).astype(grad.dtype), residuals
    )
    return grad_hidden_TD, None, grad_head_VD, None, None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "dense": _dense,
    "chunked": _chunked,
}


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


# --- weights ----------------------------------------------------------------------------------


def token_weights(mask_BC: jax.Array, norm: str, micro_batch: int = 0) -> jax.Array:
    """The weight of every token of an optimizer step, so that micro-batch losses simply add up.

    Call it once on the mask of the whole step and slice the result by micro-batches: the sum of
    Σ weight · value over them is

      micro_token_mean: the mean over micro-batches of the token mean inside each (the reference;
        a micro-batch weighs the same whatever its number of tokens, an empty one counts as 0);
      global_token_mean: the token mean of the step, whatever the micro-batches;
      seq_mean: the mean over completions of their token means. Completions without a token are
        not counted, so padding rows change nothing.

    Every count is clamped to at least 1: an empty mask gives zeros, not NaN.

    Args:
      mask_BC: 1 or True for completion tokens that count, B completions in the order in which
        they are cut into micro-batches of consecutive rows.
      micro_batch: completions per micro-batch, all devices together; 0 for B.

    Returns:
      weight_BC: float32.

    Raises:
      ValueError: unknown norm; micro_batch does not divide B.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}: the choices are {', '.join(NORMS)}")
    micro_batch = micro_batch or mask_BC.shape[0]
    if micro_batch < 1 or mask_BC.shape[0] % micro_batch:
        raise ValueError(
            f"micro_batch is {micro_batch}: it must divide the {mask_BC.shape[0]} completions"
        )
    mask_BC = jnp.asarray(mask_BC).astype(jnp.float32)
    return mask_BC / NORMS[norm](mask_BC, micro_batch)


def _micro_token_mean(mask_BC: jax.Array, micro_batch: int) -> jax.Array:
    micros = mask_BC.shape[0] // micro_batch
    count_G = jnp.sum(mask_BC.reshape(micros, -1), axis=1)
    return jnp.repeat(micros * jnp.maximum(count_G, 1), micro_batch)[:, None]


def _global_token_mean(mask_BC: jax.Array, micro_batch: int) -> jax.Array:
    del micro_batch
    return jnp.maximum(jnp.sum(mask_BC), 1)


def _seq_mean(mask_BC: jax.Array, micro_batch: int) -> jax.Array:
    del micro_batch
    count_B1 = jnp.sum(mask_BC, axis=1, keepdims=True)
    completions = jnp.sum((count_B1 > 0).astype(jnp.float32))
    return jnp.maximum(count_B1, 1) * jnp.maximum(completions, 1)


NORMS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "micro_token_mean": _micro_token_mean,
    "global_token_mean": _global_token_mean,
    "seq_mean": _seq_mean,
}
