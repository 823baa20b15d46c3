"""Computes the divergence of student and teacher, and log-probabilities, from hidden states.

Three implementations compute the same numbers. `resolve_implementation` chooses the implementation.

- `dense` builds [tokens, vocabulary] arrays and uses automatic differentiation. `dense` is the
  reference for the other two implementations (`losses/dense.py`).
- `chunked` processes blocks of tokens in plain array code. `chunked` supports all settings on every
  platform (`losses/chunked.py`).
- `pallas` processes blocks of tokens with kernels for TPU and GPU. `pallas` supports only
  divergences over the whole vocabulary (`losses/pallas/`).

`chunked` and `pallas` compute the gradient in the same sweep as the value, with the closed forms in
`losses/divergences.py`. Each block needs three matmuls: the student's logits, the teacher's logits
and the gradient of the hidden states. If the head is trained, the head's gradient needs a fourth
matmul. Temporary arrays hold only one block at a time, no matter how many tokens there are. The
sweep skips rows that are not live (`losses/token_blocks.py`).

On a mesh (`jax.set_mesh`), the axes `data` and `fsdp` split the tokens, and the axis `tensor`
splits the vocabulary. `losses/split_vocabulary.py` lists the numbers that devices exchange. Matmuls
run in the dtype of the hidden states. All other computations are in float32, or in float64 if the
states are float64.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from copsd_jax.losses import (
    chunked,
    dense,
    distributions,
    divergences,
    precision,
    split_vocabulary,
    token_blocks,
    token_values,
)
from copsd_jax.losses.pallas import dispatch

Divergence = divergences.Divergence
TokenInputs = token_values.TokenInputs
TokenStats = token_values.TokenStats
KernelOptions = dispatch.KernelOptions

CHOICES = ("auto", "dense", "chunked", "pallas")
IMPLEMENTATIONS = ("dense", "chunked", "pallas_tpu", "pallas_gpu")


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Static options of a sweep; the function `divergence` describes each option."""

    implementation: str
    chunk: int
    train_head: bool = False
    kernel: KernelOptions = dispatch.DEFAULT


def resolve_implementation(
    implementation: str, settings: Divergence | None, platform: str, one_width: bool = True
) -> str:
    """Resolves the setting `loss.implementation` to one of the names in IMPLEMENTATIONS.

    On a CPU, auto means chunked. On GPU and TPU, auto means pallas if the kernels support the
    divergence and its settings; otherwise auto means chunked. The kernels do not support top-k.

    Args:
      implementation: one of the names in CHOICES.
      settings: settings of the divergence. Pass None to compute only log-probabilities, for which
        there is no kernel.
      platform: platform of the mesh that the loss runs on (`sharding.platform`): cpu, gpu or tpu.
      one_width: whether the states of student and teacher have the same width. If policies with
        different heads are mixed (`train_step`), the policies' states are concatenated, so the
        mixed states are wider.

    Raises:
      ValueError: the name is unknown, or pallas cannot run; the message states the reason.
    """
    if implementation not in CHOICES:
        raise _refuse_loss_implementation(implementation, CHOICES)
    reason = ""
    if platform not in ("gpu", "tpu"):
        reason = f"its kernels need gpu or tpu, and the mesh is {platform}"
    elif settings is None:
        reason = "there is no divergence to compute"
    elif settings.divergence not in dispatch.DIVERGENCES:
        reason = f"its kernels do not support the divergence {settings.divergence}"
    elif settings.top_k:
        reason = f"its kernels do not support top_k, which is {settings.top_k}"
    elif not one_width:
        reason = (
            "its kernels need states of one width, and a trust region gives the teacher wider "
            "states if all weights are trained"
        )
    if implementation == "pallas" and reason:
        raise ValueError(f"implementation is 'pallas': {reason}; use chunked or auto")
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
    kernel: KernelOptions = dispatch.DEFAULT,
) -> tuple[jax.Array, TokenStats]:
    """Computes the loss Σ_t weight_t · value_t and the statistics of each token.

    The loss is differentiable in hidden_s_TD, and in head_s_VD if `train_head` is set. The
    statistics have no gradient. All arguments other than hidden_s_TD and head_s_VD are treated as
    constants. Rows of weight 0 contribute exactly nothing to the loss. Rows that are not live may
    contain anything. Rows that are not live take no time, unless the implementation is `dense` or
    the rows pad the last block. If both heads are the same array, a row whose hidden states are
    equal up to rounding (`precision.differ`) gives a loss and a gradient of exactly zero. If the
    heads are two arrays with equal values, fkl, rkl and jsd also give exactly zero for rows whose
    hidden states are exactly equal.

    For one token with p = (1/2, 1/2), q = (3/4, 1/4) and weight 1, fkl gives
    3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308 nats.

    Args:
      hidden_s_TD: the student's hidden states, which predict tokens_T. Matmuls run in the dtype of
        the states and accumulate in float32, or in float64 if the states are float64.
      hidden_t_TD: the teacher's hidden states for the same tokens.
      head_s_VD: the student's output matrix.
      head_t_VD: the teacher's output matrix. If both heads are the same array, the array is read
        only once.
      tokens_T: int32, the sampled tokens.
      weight_T: float32 weights, which include the normaliser (`loss_norms.compute_token_weights`);
        0 for rows that do not count.
      settings: settings of the divergence.
      implementation: one of the names in IMPLEMENTATIONS; see `resolve_implementation`.
      chunk: maximum number of tokens in a block of `chunked`, on each device.
      train_head: whether head_s_VD has a gradient.
      logp_old_T: see `clips.clip_importance_ratio`; read only if ratio_clip or rollout_clip is on.
      logp_rollout_T: see `clips.clip_importance_ratio`; read only if rollout_clip is on.
      live_T: bool. True requests the statistics of a row even if the row's weight is 0. Rows of
        nonzero weight are always live. None means that only rows of nonzero weight are live.
      kernel: options of pallas_tpu and pallas_gpu.

    Returns:
      The loss (a float32 scalar), and the TokenStats of the T rows. The statistics are 0 for rows
      that are not live.

    Raises:
      ValueError: the implementation is unknown or does not support a setting, the shapes disagree,
        top_k exceeds the vocabulary, or rollout_clip is on and logp_rollout_T is None.
    """
    options = SweepOptions(implementation, chunk, train_head, kernel)
    inputs = TokenInputs(tokens_T, weight_T, logp_old_T, logp_rollout_T)
    _check_loss_arguments(options, IMPLEMENTATIONS, (hidden_s_TD, hidden_t_TD), (*inputs, live_T))
    _check_loss_heads(head_s_VD, head_t_VD, settings, options)
    shared = head_s_VD is head_t_VD and hidden_s_TD.dtype == hidden_t_TD.dtype
    if not train_head:
        head_s_VD = jax.lax.stop_gradient(head_s_VD)
    hidden_t_TD, head_t_VD, inputs = jax.lax.stop_gradient((hidden_t_TD, head_t_VD, inputs))
    counts_T = inputs.weight_T != 0
    live_T = counts_T if live_T is None else counts_T | live_T
    if shared:
        differ_T = precision.differ(jax.lax.stop_gradient(hidden_s_TD), hidden_t_TD)
        inputs = inputs._replace(weight_T=jnp.where(differ_T, inputs.weight_T, 0.0))
    hidden, inputs = (hidden_s_TD, hidden_t_TD), _widen(inputs, hidden_s_TD)
    if implementation == "dense":
        hidden, inputs = token_blocks.mask_rows(live_T, (hidden, inputs))
        stats = dense.score_tokens(settings, hidden, (head_s_VD, head_t_VD), inputs)
        stats = token_blocks.mask_rows(live_T, stats)
        loss = jnp.sum(inputs.weight_T * stats.value_T)
    else:
        heads = (head_s_VD,) if shared else (head_s_VD, head_t_VD)
        loss, stats = _sweep_loss(settings, options, (hidden, inputs, live_T), heads)
    return loss, jax.lax.stop_gradient(stats)


def _widen(inputs: TokenInputs, hidden_TD: jax.Array) -> TokenInputs:
    """Casts all inputs, except the tokens, to the dtype in which sums over the states are taken."""
    tokens_T, *others = inputs
    dtype = precision.sum_dtype(hidden_TD)
    return TokenInputs(tokens_T, *jax.tree.map(lambda x: jnp.asarray(x, dtype), others))


def _refuse_loss_implementation(implementation: str, choices: Sequence[str]) -> ValueError:
    return ValueError(f"implementation is {implementation!r}: the choices are {', '.join(choices)}")


def _check_loss_arguments(
    options: SweepOptions, choices: Sequence[str], hidden: Sequence, per_token: Sequence
) -> None:
    if options.implementation not in choices:
        raise _refuse_loss_implementation(options.implementation, choices)
    if options.chunk < 1:
        raise ValueError(f"chunk is {options.chunk}: it must be at least 1")
    shapes = [x.shape for x in per_token if x is not None]
    if len({*(x.shape[:1] for x in hidden), *shapes}) != 1:
        raise ValueError(
            f"hidden states {[x.shape for x in hidden]} and arrays per token {shapes} must "
            "have the same size on the first axis"
        )


def _check_loss_heads(head_s_VD, head_t_VD, settings: Divergence, options: SweepOptions) -> None:
    sizes = head_s_VD.shape[0], head_t_VD.shape[0]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the heads have {sizes[0]} and {sizes[1]} rows: the counts must be equal")
    if settings.top_k > sizes[0]:
        raise ValueError(
            f"top_k is {settings.top_k}: the vocabulary has only {sizes[0]} entries (0 means all)"
        )
    if settings.top_k and options.implementation in dispatch.KERNELS:
        raise ValueError(
            f"top_k is {settings.top_k}: implementation {options.implementation} supports only "
            "the whole vocabulary; use chunked"
        )


# --- one sweep --------------------------------------------------------------------------------


def _sweep(
    settings: Divergence, options: SweepOptions, gradient: bool, rows: tuple, heads: tuple
) -> tuple[tuple[jax.Array, TokenStats], list]:
    """Returns the loss Σ weight · value, the statistics of all rows, and the gradients of the loss.

    `rows` is (states of student and teacher, `TokenInputs`, live_T). The first gradient is with
    respect to the student's states. The second gradient is with respect to the student's head. A
    gradient that is not requested is None.
    """
    entries, inputs = heads[0].shape[0], rows[1]
    heads = tuple(jnp.asarray(head, x.dtype) for x, head in zip(rows[0], heads, strict=False))
    if options.train_head:  # frozen heads have already been gathered
        heads = tuple(token_blocks.split_head(head, not settings.top_k) for head in heads)

    def device(rows: tuple, heads: tuple, axis: str | None) -> tuple:
        hidden, inputs, live_T = rows
        shard = split_vocabulary.VocabularyShard(axis, entries)
        train_head = options.train_head and gradient
        sweep = split_vocabulary.Sweep(settings, heads, shard, gradient, train_head)
        if options.implementation in dispatch.KERNELS:
            name, kernel = options.implementation, options.kernel
            return dispatch.sweep_live(name, kernel, sweep, (hidden, inputs), live_T)
        block = functools.partial(chunked.sweep_block, sweep)
        return token_blocks.walk(block, (hidden, inputs), live_T, options.chunk, chunked.STRIP)

    (stats, grad_hidden_TD), grad_head_VD = token_blocks.spread(
        device, rows, heads, split_vocabulary=not settings.top_k
    )
    return (jnp.sum(inputs.weight_T * stats.value_T), stats), [grad_hidden_TD, grad_head_VD]


def _sweep_value(
    settings: Divergence, options: SweepOptions, rows: tuple, heads: tuple[jax.Array, ...]
) -> tuple[jax.Array, TokenStats]:
    """Computes the loss and the statistics without gradients, with two matmuls per block."""
    return _sweep(settings, options, False, rows, heads)[0]


def _sweep_forward(
    settings: Divergence, options: SweepOptions, rows: tuple, heads: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, TokenStats], tuple]:
    """Computes loss and gradients in one sweep: 3 matmuls per block, or 4 with a trained head."""
    out, grads = _sweep(settings, options, True, rows, heads)
    if grads[1] is not None:
        grads[1] = grads[1].astype(heads[0].dtype)
    return out, (grads, (None,) * len(heads))


def _sweep_backward(_: Divergence, __: SweepOptions, residuals: tuple, cotangents: tuple) -> tuple:
    """Scales the gradients of the forward sweep; returns None for inputs without a gradient."""
    grads, others = residuals
    grad_hidden_TD, grad_head_VD = jax.tree.map(
        lambda grad: precision.scale(grad, cotangents[0].astype(precision.sum_dtype(grad))), grads
    )
    return ((grad_hidden_TD, None), None, None), (grad_head_VD, *others[1:])


_sweep_loss = jax.custom_vjp(_sweep_value, nondiff_argnums=(0, 1))
_sweep_loss.defvjp(_sweep_forward, _sweep_backward)


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
    """Computes ln softmax(logits / temperature)[token] and the distribution's entropy, in nats.

    The log-probability is differentiable in hidden_TD, and in head_VD if `train_head` is set. The
    entropy has no gradient.

    For the values alone, `chunked` needs one matmul per block. For the values and the gradient of
    the states, `chunked` needs two matmuls per block. The forward sweep computes the gradient of
    each token's log-probability with respect to the token's own hidden state. The backward pass
    scales the gradient that the forward sweep has computed. If the head is trained, `chunked` needs
    four matmuls, because the logits are computed again.

    For example, with logits (0, ln 3) and temperature 1, token 0 has the log-probability
    ln(1/4) = -1.386, and the entropy is 0.562.

    Args:
      hidden_TD: states that predict tokens_T; see `divergence`.
      head_VD: output matrix, which is rounded to the dtype of the states.
      tokens_T: int32, the given tokens.
      temperature: number above 0 by which the logits are divided.
      implementation: dense or chunked.
      chunk: maximum number of tokens in a block of `chunked`, on each device.
      train_head: whether head_VD has a gradient.
      live_T: bool. Rows that are not live may contain anything; the results of these rows are 0 and
        have no gradient. None means that all rows are live.

    Returns:
      logp_T and entropy_T, [T] each, in float32 (or in float64 if the states are float64).

    Raises:
      ValueError: the implementation is unknown, the shapes disagree, or the temperature is not
        above 0.
    """
    options = SweepOptions(implementation, chunk, train_head)
    _check_loss_arguments(options, ("dense", "chunked"), (hidden_TD,), (tokens_T, live_T))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0")
    if not train_head:
        head_VD = jax.lax.stop_gradient(head_VD)
    if live_T is None:
        live_T = jnp.ones(tokens_T.shape, bool)
    if implementation == "chunked":
        static = chunked.ScoreOptions(temperature, chunk, train_head)
        logp_T, entropy_T = chunked.score_tokens(static, hidden_TD, head_VD, tokens_T, live_T)
        return logp_T, jax.lax.stop_gradient(entropy_T)
    logits_TV = dense.compute_logits(token_blocks.mask_rows(live_T, hidden_TD), head_VD)
    whole = distributions.softmax(logits_TV * (1 / temperature))
    logp_T = token_blocks.mask_rows(live_T, distributions.pick(whole.log, tokens_T))
    entropy_T = token_blocks.mask_rows(live_T, distributions.entropy(whole))
    return logp_T, jax.lax.stop_gradient(entropy_T)
