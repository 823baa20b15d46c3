"""The divergence of two streams of hidden states through their heads, and weights of tokens.

`dense` holds [tokens, vocabulary] arrays and leaves the gradient to automatic differentiation of
the value: the reference for the others, which walk over blocks of tokens and take the gradient in
the same sweep from the closed forms of `losses/divergences.py`: three matmuls per block (student's
logits, teacher's logits, gradient of the hidden states), a fourth only if the head trains, and
memory for one block whatever the number of tokens. Rows without weight are packed away before it.

`chunked` (plain array code, `losses/chunked.py`) does all settings on every platform; `pallas`
(kernels for TPU and GPU, `kernels/`) the divergences of whole vocabularies. `resolve` chooses.

`log_probs` gives the log-probabilities of tokens, dense or chunked, for the losses that need no
second side. Also the weights with which tokens enter a step's loss (`token_weights`).

On a mesh (`jax.set_mesh`) tokens are split over its axes data and fsdp and the vocabulary over
tensor; `losses/chunked.py` says what travels. Matmuls run in the hidden states' dtype; all else is
float32, or float64 for float64 states.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from copsd_jax.losses import chunked, divergences, token_blocks
from copsd_jax.losses.pallas import dispatch as kernels

Divergence = divergences.Divergence
TokenStats = divergences.TokenStats
Kernel = kernels.Kernel

CHOICES = ("auto", "dense", "chunked", "pallas")
IMPLEMENTATIONS = ("dense", "chunked", "pallas_tpu", "pallas_gpu")


@dataclasses.dataclass(frozen=True)
class How:
    """Static choices of a sweep, see `divergence`."""

    implementation: str
    chunk: int
    train_head: bool = False
    kernel: Kernel = kernels.PLAIN


class Rows(NamedTuple):
    """What is known of each token besides its hidden states; constants, [T]."""

    tokens_T: jax.Array
    weight_T: jax.Array
    logp_old_T: jax.Array | None
    logp_rollout_T: jax.Array | None


def resolve(
    implementation: str,
    settings: Divergence | None,
    platform: str,
    one_width: bool = True,
) -> str:
    """The implementation that runs, one of IMPLEMENTATIONS.

    auto is chunked on a CPU, and on GPU and TPU the kernels where they can do the settings: all but
    the top-k forms, which only chunked has.

    Args:
      implementation: one of CHOICES.
      settings: None without a divergence: log-probabilities alone have no kernel.
      platform: cpu, gpu or tpu, of the mesh that the loss runs on; see `sharding.platform`.
      one_width: whether both sides' states have one width. Those of a mix of policies with heads
        of their own stand side by side (`train_step`).

    Raises:
      ValueError: an unknown name; pallas where it cannot run, with what to change.
    """
    if implementation not in CHOICES:
        raise ValueError(
            f"implementation is {implementation!r}: the choices are {', '.join(CHOICES)}"
        )
    reason = ""
    if platform not in ("gpu", "tpu"):
        reason = f"its kernels are for gpu and tpu and the mesh is {platform}"
    elif settings is None:
        reason = "there is no divergence to compute"
    elif settings.top_k:
        reason = f"its kernels have no top_k, which is {settings.top_k}"
    elif not one_width:
        reason = "its kernels need states of one width, and a trust region of all weights has two"
    if implementation == "pallas" and reason:
        raise ValueError(f"implementation is 'pallas': {reason}, take chunked or auto")
    if implementation in ("auto", "pallas"):
        return "chunked" if reason else f"pallas_{platform}"
    return implementation


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
    kernel: Kernel = kernels.PLAIN,
) -> tuple[jax.Array, TokenStats]:
    """Σ_t weight_t · value_t and what is known of each token.

    Differentiable in hidden_s_TD, and in head_s_VD if `train_head`; every other argument, and the
    statistics, are constants to differentiation. Rows of weight 0 contribute exactly nothing,
    whatever they hold (if they are live: any finite numbers), and but for `dense` and the last
    block cost nothing. Equal hidden states and heads give exactly zero loss and gradient for fkl,
    rkl and jsd.

    Args:
      hidden_s_TD, hidden_t_TD: states that predict tokens_T, of student and teacher; the matmuls
        run in their dtype and accumulate in float32 or more.
      head_s_VD, head_t_VD: output matrices; may be one array, which is then moved once for both.
      tokens_T: int32, the sampled tokens.
      weight_T: float32; 0 is not a token. It carries the normaliser, see `token_weights`.
      implementation: one of IMPLEMENTATIONS, as `resolve` gives it.
      chunk: tokens per block of `chunked`, at most, on each device.
      logp_old_T, logp_rollout_T: see `divergences.importance`; read only where its clips are on.
      live_T: bool, rows whose statistics are wanted though their weight may be 0; rows of other
        weight are always live. None for those alone.
      kernel: of pallas_tpu and pallas_gpu.

    Returns:
      The loss, a float32 scalar, and the TokenStats of the T rows, 0 where they are not live.

    Raises:
      ValueError: unknown implementation or one that lacks a setting, shapes that do not fit, top_k
        above the vocabulary, rollout_clip without logp_rollout_T.
    """
    how = How(implementation, chunk, train_head, kernel)
    rows = Rows(tokens_T, weight_T, logp_old_T, logp_rollout_T)
    _check(how, IMPLEMENTATIONS, (hidden_s_TD, hidden_t_TD), (*rows, live_T))
    _check_heads(head_s_VD, head_t_VD, settings, how)
    shared = head_s_VD is head_t_VD and hidden_s_TD.dtype == hidden_t_TD.dtype
    if not train_head:
        head_s_VD = jax.lax.stop_gradient(head_s_VD)
    hidden_t_TD, head_t_VD, rows = jax.lax.stop_gradient((hidden_t_TD, head_t_VD, rows))
    alive_T = rows.weight_T != 0
    if live_T is not None:
        alive_T = alive_T | live_T
    hidden, rows = (hidden_s_TD, hidden_t_TD), _widened(rows, hidden_s_TD)
    heads = (head_s_VD,) if shared else (head_s_VD, head_t_VD)
    if implementation == "dense":
        hidden = tuple(token_blocks.masked(alive_T, x) for x in hidden)
        rows = Rows(*token_blocks.masked(alive_T, rows))
        stats = token_blocks.masked(alive_T, _dense(settings, hidden, (heads[0], head_t_VD), rows))
        loss = jnp.sum(rows.weight_T * stats.value_T)
    else:
        swept: Any = _swept(settings, how, hidden, heads, rows, alive_T)
        loss, stats = swept
    return loss, jax.lax.stop_gradient(stats)


def _widened(rows: Rows, hidden_TD: jax.Array) -> Rows:
    wide = chunked.wide(hidden_TD)
    cast = lambda x: None if x is None else jnp.asarray(x, wide)  # noqa: E731
    weight_T = jnp.asarray(rows.weight_T, wide)
    return Rows(rows.tokens_T, weight_T, cast(rows.logp_old_T), cast(rows.logp_rollout_T))


def _check(how: How, choices: Any, hidden: tuple, per_token: Any) -> None:
    if how.implementation not in choices:
        raise ValueError(
            f"implementation is {how.implementation!r}: the choices are {', '.join(choices)}"
        )
    if how.chunk < 1:
        raise ValueError(f"chunk is {how.chunk}: it must be at least 1")
    shapes = [x.shape for x in per_token if x is not None]
    if len({*(x.shape[:1] for x in hidden), *shapes}) != 1:
        raise ValueError(
            f"hidden states {[x.shape for x in hidden]} and the arrays per token {shapes} must "
            "agree in their first axis"
        )


def _check_heads(
    head_s_VD: jax.Array, head_t_VD: jax.Array, settings: Divergence, how: How
) -> None:
    sizes = head_s_VD.shape[0], head_t_VD.shape[0]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the heads have {sizes[0]} and {sizes[1]} rows: one vocabulary is needed")
    if settings.top_k > sizes[0]:
        raise ValueError(
            f"top_k is {settings.top_k}: the vocabulary has {sizes[0]} entries (0 is off)"
        )
    if settings.top_k and how.implementation in kernels.SWEEPS:
        raise ValueError(
            f"top_k is {settings.top_k}: implementation {how.implementation} has whole "
            "vocabularies only, take chunked"
        )


# --- dense ------------------------------------------------------------------------------------


def _dense(settings: Divergence, hidden: tuple, heads: tuple, rows: Rows) -> TokenStats:
    """All tokens at once; the gradient is automatic differentiation's, of value_T."""
    logits_s_TV, logits_t_TV = map(_dense_logits, hidden, heads)
    student = divergences.side(logits_s_TV * (1 / settings.temperature))
    teacher = divergences.side(logits_t_TV * (1 / settings.temperature))
    sampling_T = divergences.log_prob(logits_s_TV, rows.tokens_T, settings.sampling_temperature)
    ratio_T = divergences.importance(sampling_T, rows.logp_old_T, rows.logp_rollout_T, settings)
    value_T, mass_T = divergences.value(logits_s_TV, logits_t_TV, rows.tokens_T, settings)
    return TokenStats(
        value_T * ratio_T,
        divergences.pick(student.log, rows.tokens_T),
        divergences.pick(teacher.log, rows.tokens_T),
        sampling_T,
        divergences.entropy(student),
        divergences.entropy(teacher),
        mass_T,
        ratio_T,
    )


def _dense_logits(hidden_TD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Wide copies of rounded operands multiply exactly as the operands themselves."""
    wide = chunked.wide(hidden_TD)
    return chunked.dot(hidden_TD.astype(wide), head_VD.astype(hidden_TD.dtype).astype(wide), 1, 1)


# --- one sweep --------------------------------------------------------------------------------


def _sweep(
    settings: Divergence, how: How, gradient: bool, hidden: tuple, heads: tuple, rows: Rows, alive_T
) -> tuple[TokenStats, jax.Array | None, jax.Array | None]:
    """Statistics and, if wanted, gradients of Σ weight · value, over the whole mesh."""
    entries = heads[0].shape[0]
    heads = tuple(jnp.asarray(head, x.dtype) for x, head in zip(hidden, heads, strict=False))
    if how.train_head:  # frozen ones were gathered ahead
        heads = tuple(token_blocks.divided(head, not settings.top_k) for head in heads)

    def device(inputs: tuple, heads: tuple, axis: str | None) -> tuple:
        args: Any = (settings, *inputs, heads)
        static: Any = {
            "gradient": gradient, "train_head": how.train_head and gradient,
            "vocab_axis": axis, "vocab_size": entries,
        }  # fmt: skip
        if how.implementation in kernels.SWEEPS:
            return kernels.device(how.implementation, how.kernel, *args, **static)
        return chunked.device(how.chunk, *args, **static)

    (stats, grad_hidden_TD), grad_head_VD = token_blocks.spread(
        device, (hidden, tuple(rows), alive_T), heads, split_vocabulary=not settings.top_k
    )
    return stats, grad_hidden_TD, grad_head_VD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swept(
    settings: Divergence, how: How, hidden: tuple, heads: tuple, rows: Rows, alive_T: jax.Array
) -> tuple[jax.Array, TokenStats]:
    """The value alone, two matmuls per block; differentiation goes through `_swept_forward`."""
    stats = _sweep(settings, how, False, hidden, heads, rows, alive_T)[0]
    return jnp.sum(rows.weight_T * stats.value_T), stats


def _swept_forward(
    settings: Divergence, how: How, hidden: tuple, heads: tuple, rows: Rows, alive_T: jax.Array
) -> tuple[tuple[jax.Array, TokenStats], tuple]:
    """Value and gradient in one sweep: three matmuls per block, four if the head trains."""
    stats, *grads = _sweep(settings, how, True, hidden, heads, rows, alive_T)
    if grads[1] is not None:
        grads[1] = grads[1].astype(heads[0].dtype)
    return (jnp.sum(rows.weight_T * stats.value_T), stats), (grads, (None,) * len(heads))


def _swept_backward(settings: Divergence, how: How, residuals: tuple, cotangents: tuple) -> tuple:
    """Scales the gradient that the forward sweep has taken; None is a zero cotangent."""
    del settings, how
    grads, others = residuals
    grad_hidden_TD, grad_head_VD = jax.tree.map(
        lambda grad: chunked.scale(grad, cotangents[0].astype(chunked.wide(grad))), grads
    )
    return (grad_hidden_TD, None), (grad_head_VD, *others[1:]), None, None


_swept.defvjp(_swept_forward, _swept_backward)


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
      hidden_TD, head_VD, tokens_T, chunk: as in `divergence`.
      implementation: dense or chunked.
      live_T: bool; other rows give 0 and have no gradient, whatever they hold. None for all.

    Returns:
      logp_T and entropy_T, float32.

    Raises:
      ValueError: unknown implementation, shapes that do not fit, temperature not above 0.
    """
    how = How(implementation, chunk, train_head)
    _check(how, ("dense", "chunked"), (hidden_TD,), (tokens_T, live_T))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
    if not train_head:
        head_VD = jax.lax.stop_gradient(head_VD)
    if live_T is None:
        live_T = jnp.ones(tokens_T.shape, bool)
    if implementation == "chunked":
        static = (temperature, chunk, train_head)
        values: Any = chunked.scored(static, hidden_TD, head_VD, tokens_T, live_T)
        return values[0], jax.lax.stop_gradient(values[1])
    logits_TV = _dense_logits(token_blocks.masked(live_T, hidden_TD), head_VD)
    whole = divergences.side(logits_TV * (1 / temperature))
    logp_T = token_blocks.masked(live_T, divergences.pick(whole.log, tokens_T))
    entropy_T = token_blocks.masked(live_T, divergences.entropy(whole))
    return logp_T, jax.lax.stop_gradient(entropy_T)


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
