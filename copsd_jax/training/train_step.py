"""The train step: a pure function that scores completions under two sequence layouts.

Student and teacher are policies over shared parameters. The two policies score the same completion
y, each after its own prompt. The student's prompt is x; the teacher's prompt c usually adds
privileged context. The completion tokens therefore have different positions on the two sides:

    student row    x  x  x  y1 y2 y3 .  .
    gathered             h1 h2 h3              states that predict y1 y2 y3, with gradient

    teacher row    c  c  c  c  c  y1 y2 y3
    gathered                   g1 g2 g3        states that predict y1 y2 y3, without gradient

The gathered states of both sides have the same shape, [B · C, D]. `layout.py` contains the index
arithmetic and a numerical example.

Over the completion tokens y_bt of the batch, the train step minimizes

    L(θ) = Σ_bt w_bt · D(p_bt, sg[q_bt])  +  Σ_bt u_bt · ℓ_bt(θ)

    p_bt = softmax(z(θ; x_b, y_b,<t) / τ)                      student
    q_bt = softmax(Σ_k s_k · z(θ_k; c_b, y_b,<t) / τ)          teacher, Σ_k s_k = 1

where z are the logits, τ is the temperature of the loss, and sg stops the gradient. D is a
divergence from `losses/divergences.py`. ℓ is the policy loss on the sampled tokens: GRPO's
surrogate, or the cross entropy of SFT. Either term of L may be absent. The weights w and u are
token weights from `loss_norms.compute_token_weights`, multiplied by `Options.weight` and by
`PolicyLoss.weight`, respectively. Token weights are normalised over the whole step, so the losses
of micro-batches add up to L.

The kinds of teacher differ only in their shares s_k and weights θ_k:

    fixed         1 · θ_0                       the initial policy
    ema           1 · θ_ema                     θ_ema ← d · θ_ema + (1 - d) · θ after every update
    live          1 · θ                         the student's current weights
    trust_region  (1 - ρ) · θ_0  and  ρ · θ     a geometric interpolation of policies (SDPO)

The trained tree contains either LoRA adapters or all parameters. `layout.batch_shardings` and
`builders.build_step` choose the shardings, so this file names no mesh axes.

A step changes nothing but `State.step` in two cases. In the first case, the loss or the gradient is
not finite. In the second case, the norm of the gradient is at most `Options.min_grad_norm`. Without
the second case, momentum and weight decay would move the weights in a step in which no token
carries loss, and Adam would turn rounding errors into a full update. In both cases, the weights,
the optimizer and the teacher's average keep their values. The optimizer's own count of steps does
not increase, so the learning-rate schedule does not advance.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from copsd_jax.losses import divergence_loss, loss_norms, policy_loss, precision, token_blocks
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import shared_prefix, transformer
from copsd_jax.runtime import nonfinite
from copsd_jax.training import layout, micro_batches


class State(NamedTuple):
    """The state that a step updates.

    `trained` and `ema` are float32 trees of the same structure. For teachers other than ema, `ema`
    is the initial policy's adapter, which never changes. If the initial policy has no adapter,
    `ema` is None.
    """

    step: jax.Array  # int32 scalar: number of completed steps
    trained: dict
    optimizer: optax.OptState
    ema: dict | None  # equals `trained` at step 0, or is None


@dataclasses.dataclass(frozen=True)
class Options:
    """Choices that are fixed when a step is compiled."""

    trainable: str  # 'lora' | 'full'
    teacher: str  # 'fixed' | 'ema' | 'live' | 'trust_region'
    ema_decay: float
    adapter_scale: float
    divergence: divergence_loss.Divergence | None  # None for a loss without a teacher
    implementation: str  # a name in divergence_loss.IMPLEMENTATIONS
    chunk: int  # number of tokens per block of the implementation 'chunked'
    norm: str  # normaliser of the divergence, a name in loss_norms.NORMS
    group: int  # number of completions per group for the norm micro_token_mean; 0 means one group
    micro_batches: int  # number of micro-batches; read only for unpacked batches
    rho: float = 0.0  # share of the student in the mix of a trust_region teacher
    weight: float = 1.0  # factor of the divergence in the loss
    policy: "PolicyLoss | None" = None  # None for a loss without a policy term
    chip: str = ""  # device kind of the mesh, which determines the kernels' block sizes
    min_grad_norm: float = 0.0  # maximum global norm of a gradient that counts as zero


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """Settings of the loss on sampled tokens.

    The loss is GRPO's surrogate, or the cross entropy of SFT if `kind` is 'nll'.
    """

    kind: str  # 'surrogate' | 'nll'
    weight: float  # factor of the policy loss in the total loss
    temperature: float  # number by which the logits are divided
    norm: str  # a name in loss_norms.NORMS
    length: int  # maximum number of tokens of a completion, for the norm 'constant'
    clip_low: float = 0.0  # bounds of the ratio (`policy_loss.compute_surrogate`); 0 means no bound
    clip_high: float = 0.0
    dual_clip: float = 0.0
    kl: float = 0.0  # factor of the divergence from the initial policy; 0 means no such term
    old: str = "trainer"  # 'trainer' | 'sampler': source of the ratio's old log-probabilities
    rollout_clip: float = 0.0  # cap of token weights p_trainer / p_sampler; 0 means no weighting


class PolicyStats(NamedTuple):
    """Per-token statistics of the policy loss: float32 arrays without gradient.

    The arrays have the shape [T] for a micro-batch, and the shape [B, C] in `Aux`. The values of
    tokens without policy loss are 0.

    Attributes:
      value_T: the token's policy loss, without its weight in the total loss.
      logp_T: log-probability of the sampled token at the loss's temperature, in nats.
      entropy_T: entropy of the distribution at the loss's temperature, in nats.
      clipped_T: 1 where the ratio was clipped, else 0.
      kl_T: estimated divergence from the initial policy, in nats; 0 if the loss has no such term.
    """

    value_T: jax.Array
    logp_T: jax.Array
    entropy_T: jax.Array
    clipped_T: jax.Array
    kl_T: jax.Array


class Aux(NamedTuple):
    """Measurements of a step: scalars, and per-token values [B, C] in the order of the batch."""

    metrics: dict[str, jax.Array]
    tokens: divergence_loss.TokenStats | None  # statistics of the divergence
    policy: PolicyStats | None = None


def make_optimizer(
    *, steps: int, lr: float, schedule: str, warmup: int, weight_decay: float, b1: float,
    b2: float, eps: float, max_grad_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:  # fmt: skip
    """Builds AdamW with a global-norm clip of the gradient, and the learning-rate schedule.

    During the warm-up, the rate rises linearly to `lr`. After the warm-up, the schedule `constant`
    keeps the rate at `lr`. The schedules `linear` and `cosine` lower the rate to 0 at step `steps`.
    Example: a linear schedule of n steps without warm-up uses the rate lr · (1 - k / n) in step k,
    counted from 0.

    Args:
      steps: number of optimizer steps in the whole run.
      lr: peak learning rate.
      schedule: constant, linear or cosine.
      warmup: number of warm-up steps; 0 means no warm-up.
      weight_decay: AdamW's weight decay; AdamW multiplies it by the learning rate.
      b1: decay of AdamW's first moment.
      b2: decay of AdamW's second moment.
      eps: number that is added to the root of the second moment.
      max_grad_norm: largest global norm of the gradient; 0 means no clip.

    Returns:
      The gradient transformation, and the learning rate as a function of the step.
    """
    decay = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "linear": lambda: optax.linear_schedule(lr, 0.0, decay),
        "cosine": lambda: optax.cosine_decay_schedule(lr, decay),
    }[schedule]()
    # Step k of a warm-up uses (k + 1) / (warmup + 1) of lr, so step 0 already changes parameters.
    rise = optax.linear_schedule(lr / (warmup + 1), lr, warmup) if warmup else None
    rate = optax.join_schedules([rise, after], [warmup]) if rise else after
    chain = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    chain.append(optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))
    return optax.chain(*chain), rate


def init_train_state(
    trained: dict, tx: optax.GradientTransformation, teacher: str, keep: bool = False
) -> State:
    """Returns the training state at step 0.

    With teacher.weights=ema, the average begins as a copy of the trained tree. With `keep`, the
    trained tree is an adapter that is not zero, and the State keeps a copy of it as the adapter of
    the initial policy.
    """
    ema = jax.tree.map(jnp.copy, trained) if keep or teacher == "ema" else None
    return State(jnp.zeros((), jnp.int32), trained, tx.init(trained), ema)


def derive_policies(
    state: State, frozen: dict, options: Options, dtype: jnp.dtype
) -> tuple[policy_lib.Policy, policy_lib.Policy]:
    """Returns the policies (student, teacher) of a state.

    With LoRA, `frozen` contains the base parameters, and a `fixed` teacher is the base model
    without an adapter. A `fixed` teacher equals the initial policy, because a new adapter has no
    effect. If the run starts from an existing adapter (model.init_from), a `fixed` teacher has this
    adapter, which `state.ema` keeps. With full fine-tuning, `frozen` contains the initial weights
    if the run needs them. With a trust region, the returned teacher is the initial policy, and
    `list_teacher_mixture` adds the student's share. If a run with a trust region has
    author.kind=teacher, the initial policy alone writes the contexts.

    Args:
      state: the training state; only `trained` and `ema` are read.
      frozen: parameters that the run does not train.
      options: the options; only `trainable`, `teacher` and `adapter_scale` are read.
      dtype: dtype in which the model computes; full fine-tuning casts the float32 trees to this
        dtype.
    """
    side = functools.partial(policy_lib.Policy, scale=options.adapter_scale)
    if options.trainable == "lora":
        teacher = {
            "fixed": state.ema, "trust_region": state.ema, "live": state.trained, "ema": state.ema,
        }[options.teacher]  # fmt: skip
        return side(frozen, state.trained), side(frozen, teacher)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)  # noqa: E731
    student = cast(state.trained)
    if options.teacher in ("fixed", "trust_region"):
        return side(student), side(frozen)
    teacher = student if options.teacher == "live" else cast(state.ema)
    return side(student), side(teacher)


def list_teacher_mixture(
    student: policy_lib.Policy, teacher: policy_lib.Policy, options: Options
) -> tuple[tuple[float, policy_lib.Policy], ...]:
    """Returns the policies whose logits the teacher mixes, as pairs (share, policy).

    Without a trust region, a teacher has a single policy, with share 1. A trust region mixes the
    initial policy with share 1 - rho and the student with share rho, both on the teacher's input. A
    mix of logits is a geometric interpolation of the distributions (SDPO).
    """
    if options.teacher != "trust_region":
        return ((1.0, teacher),)
    return ((1 - options.rho, teacher), (options.rho, student))


def _mix_teacher_states(
    shares: list[float], hidden: list[jax.Array], heads: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns hidden states [T, D] and a head [V, D] whose product is the mix of the logits.

    If all policies have the same head, mixing their hidden states is enough and needs no further
    matrix product. If the heads differ, both the heads and the hidden states are concatenated along
    D. The mix is computed in float32 and rounded once. In bfloat16, the shares .95 and .05 would
    add up to .9993, which would scale all logits.
    """
    if len(hidden) == 1:
        return hidden[0], heads[0]
    wide = precision.sum_dtype(hidden[0])
    scaled = [h.astype(wide) * share for share, h in zip(shares, hidden, strict=True)]
    if all(head is heads[0] for head in heads):
        return sum(scaled[1:], scaled[0]).astype(hidden[0].dtype), heads[0]
    mixed = jnp.concatenate(scaled, axis=1).astype(hidden[0].dtype)
    return mixed, jnp.concatenate(heads, axis=1)


def _compute_side_states(
    decoder: transformer.Decoder,
    sides: list[tuple[policy_lib.Policy, layout.Side, transformer.KV | None]],
) -> list[jax.Array]:
    """Returns each side's hidden states [B · C, D], which predict the completion tokens.

    Sides whose base parameters are the same object are computed in one pass through the layers.
    """
    streams = [
        transformer.Stream(
            side.tokens_BL, side.positions_BL, side.segments_BL, policy.adapter, policy.scale,
            prefix, parents_BL=side.parents_BL,
        )
        for policy, side, prefix in sides
    ]  # fmt: skip
    outputs: dict[int, transformer.Output] = {}
    for first, (policy, _, _) in enumerate(sides):
        if first in outputs:
            continue
        those = [k for k, side in enumerate(sides) if side[0].params is policy.params]
        found: Any = decoder.apply({"params": policy.params}, tuple(streams[k] for k in those))
        outputs |= dict(zip(those, found, strict=True))
    return [
        _gather_completion_states(outputs[k].hidden_BLD, side[1].gather_BC)
        for k, side in enumerate(sides)
    ]


def _gather_completion_states(hidden_BLD: jax.Array, gather_BC: jax.Array) -> jax.Array:
    """Returns the hidden states [B · C, D] at the positions in `gather_BC`.

    The flattened rows have B equal parts, and row b of `gather_BC` points only into part b. Because
    each part has its own gather, the compiler sees that no hidden state has to travel between
    devices.
    """
    parts, D = len(gather_BC), hidden_BLD.shape[-1]
    hidden_BLD = hidden_BLD.reshape(parts, -1, D)
    start_B = jnp.arange(parts, dtype=jnp.int32) * hidden_BLD.shape[1]
    taken_BCD = jax.vmap(lambda hidden_LD, at_C: hidden_LD[at_C])(
        hidden_BLD, gather_BC - start_B[:, None]
    )
    return taken_BCD.reshape(-1, D)


def _flatten_micro(x: Any) -> Any:
    return None if x is None else x.reshape(-1)


def _compute_micro_policy_loss(
    settings: PolicyLoss, options: Options, hidden_s: jax.Array, hidden_ref: jax.Array | None,
    heads: tuple[jax.Array, jax.Array | None], micro: layout.Batch, weight_BC: jax.Array,
) -> tuple[jax.Array, PolicyStats]:  # fmt: skip
    """Returns the weighted sum of the policy loss over a micro-batch's tokens, and statistics.

    The surrogate's ratio is exp(ln p - old), where `old` is the log-probability from the sampler or
    from the trainer. If `old` is from the trainer, the ratio is exactly 1, and its gradient is the
    gradient of ln p.

    `hidden_s` and `hidden_ref` are the hidden states [T, D] of the student and of the initial
    policy. `heads` contains the student's head and the initial policy's head. Without a divergence
    from the initial policy, `hidden_ref` and the second head are None.
    """
    # `chunked` computes log-probabilities with only two matrix products per block, so no kernel for
    # log-probabilities is needed.
    implementation = "dense" if options.implementation == "dense" else "chunked"
    log_probs = lambda hidden, head, trained: divergence_loss.log_probs(  # noqa: E731
        hidden, head, _flatten_micro(micro.completion_BC), temperature=settings.temperature,
        implementation=implementation, chunk=options.chunk, train_head=trained,
        live_T=_flatten_micro(micro.policy_BC),
    )  # fmt: skip
    logp_T, entropy_T = log_probs(hidden_s, heads[0], options.trainable == "full")
    own_T = jax.lax.stop_gradient(logp_T)
    clipped_T = kl_T = jnp.zeros_like(own_T)
    if settings.kind == "nll":
        value_T = -logp_T
    else:
        old_T = own_T if settings.old == "trainer" else _flatten_micro(micro.logp_rollout_BC)
        value_T, clipped_T = policy_loss.compute_surrogate(
            logp_T, old_T, _flatten_micro(micro.advantage_BC), clip_low=settings.clip_low,
            clip_high=settings.clip_high, dual_clip=settings.dual_clip,
        )  # fmt: skip
    if settings.rollout_clip:
        # Clipping to [-20, 20] keeps exp finite, as policy_loss.LOG_RATIO does for the surrogate's
        # ratio.
        gap_T = jnp.clip(own_T - _flatten_micro(micro.logp_rollout_BC), -20, 20)
        value_T = value_T * jnp.minimum(jnp.exp(gap_T), settings.rollout_clip)
    if hidden_ref is not None:
        ref_T = jax.lax.stop_gradient(log_probs(hidden_ref, heads[1], False)[0])
        kl_T = policy_loss.estimate_kl(logp_T, ref_T)
        value_T = value_T + settings.kl * kl_T
    stats = PolicyStats(value_T, logp_T, entropy_T, clipped_T.astype(jnp.float32), kl_T)
    live_T = _flatten_micro(micro.policy_BC)
    stats = jax.tree.map(lambda x: jnp.where(live_T, jax.lax.stop_gradient(x), 0.0), stats)
    return jnp.sum(jnp.where(live_T, _flatten_micro(weight_BC) * value_T, 0.0)), stats


def _build_micro_batch_loss(
    decoder: transformer.Decoder, options: Options
) -> Callable[..., tuple[jax.Array, tuple]]:
    """Builds the loss function of a micro-batch.

    The first argument of the loss function is the trained tree.
    """
    policy = options.policy

    def loss(trained, state, frozen, head, micro, weights, student_prefix, teacher_kv):
        head_of = lambda side: transformer.get_head(side.params) if head is None else head  # noqa: E731
        student, teacher = derive_policies(
            state._replace(trained=trained), frozen, options, decoder.dtype
        )
        teacher, still = jax.lax.stop_gradient(teacher), jax.lax.stop_gradient(student)
        # `_compute_side_states` runs two sides in one pass if their base parameters are the same
        # object. `stop_gradient` returns new objects, so the original objects are put back here.
        # The gradient is stopped again below, at the hidden states.
        still = dataclasses.replace(still, params=student.params)
        if options.trainable == "lora" or options.teacher == "live":
            teacher = dataclasses.replace(teacher, params=student.params)
        encode = lambda side: None if student_prefix is None else shared_prefix.encode_prefix(  # noqa: E731
            decoder, side, student_prefix[None]
        )  # fmt: skip
        sides = [(student, micro.student, encode(student))]
        mix = list_teacher_mixture(still, teacher, options) if options.divergence else ()
        kvs = teacher_kv if mix and teacher_kv is not None else [None] * len(mix)
        sides += [(side, micro.teacher, kv) for (_, side), kv in zip(mix, kvs, strict=True)]
        kept = None if options.teacher == "ema" else state.ema
        initial = policy_lib.Policy(frozen, kept, options.adapter_scale)
        if policy and policy.kl:
            sides.append((initial, micro.student, encode(initial)))
        hidden_s, *others = _compute_side_states(decoder, sides)
        others = jax.lax.stop_gradient(others)
        total, stats, policy_stats = jnp.zeros((), jnp.float32), None, None
        if options.divergence:
            hidden_t, head_t = _mix_teacher_states(
                [share for share, _ in mix], others[: len(mix)],
                [head_of(jax.lax.stop_gradient(side)) for _, side in mix],
            )  # fmt: skip
            value, stats = divergence_loss.divergence(
                hidden_s, hidden_t, head_of(student), head_t,
                _flatten_micro(micro.completion_BC), _flatten_micro(weights[0]), options.divergence,
                implementation=options.implementation, chunk=options.chunk,
                train_head=options.trainable == "full", live_T=_flatten_micro(micro.mask_BC),
                logp_rollout_T=_flatten_micro(micro.logp_rollout_BC),
                kernel=divergence_loss.KernelOptions(chip=options.chip),
            )  # fmt: skip
            total = total + value
        if policy:
            value, policy_stats = _compute_micro_policy_loss(
                policy, options, hidden_s, others[-1] if policy.kl else None,
                (head_of(student), head_of(initial) if policy.kl else None), micro, weights[1],
            )  # fmt: skip
            total = total + value
        return total, (stats, policy_stats)

    return loss


def _weigh_step_tokens(batch: layout.Batch, options: Options) -> tuple[jax.Array, jax.Array]:
    """Returns a step's token weights [B, C], for the divergence and for the policy loss."""
    distill_BC = policy_BC = jnp.zeros(batch.mask_BC.shape, jnp.float32)
    if options.divergence:
        distill_BC = loss_norms.compute_token_weights(batch.loss_BC, options.norm, options.group)
        distill_BC = distill_BC * options.weight
    if policy := options.policy:
        policy_BC = loss_norms.compute_token_weights(
            batch.policy_BC, policy.norm, options.group, length=policy.length
        )
        policy_BC = policy_BC * policy.weight
    return distill_BC, policy_BC


def _prepare_micro_batches(
    frozen: dict, batch: layout.Batch, options: Options
) -> tuple[jax.Array | None, tuple, Callable]:
    """Returns the head that all policies share, the micro-batches, and the function `join`.

    The micro-batches are the pair (batches, token weights), stacked along the first axis.
    """
    cut, join = micro_batches.make_cuts(batch, options.micro_batches)
    weights = tuple(map(cut, _weigh_step_tokens(batch, options)))
    head = None
    if options.trainable == "lora":
        # The frozen head is gathered once per step, before the loop over micro-batches. For a top-k
        # divergence, each device needs the logits of the whole vocabulary, so the head is not split
        # along V.
        few = options.divergence is not None and options.divergence.top_k > 0
        head = token_blocks.gather_head(transformer.get_head(frozen), split_vocabulary=not few)
    return head, (micro_batches.split_batch(batch, options.micro_batches), weights), join


def make_scores(
    decoder: transformer.Decoder, options: Options
) -> Callable[..., tuple[divergence_loss.TokenStats | None, PolicyStats | None]]:
    """Builds a function that scores a batch's tokens in the same way as the train step.

        scores(state, frozen, batch, student_prefix, teacher_kv) -> (Aux.tokens, Aux.policy)

    `make_step` describes the arguments. No gradient is computed.
    """
    loss = _build_micro_batch_loss(decoder, options)

    def scores(state, frozen, batch, student_prefix, teacher_kv):
        head, inputs, join = _prepare_micro_batches(frozen, batch, options)
        one = lambda _, pair: (  # noqa: E731
            None, loss(state.trained, state, frozen, head, *pair, student_prefix, teacher_kv)[1]
        )  # fmt: skip
        return jax.tree.map(join, jax.lax.scan(one, None, inputs)[1])

    return scores


def make_gradient(
    decoder: transformer.Decoder, options: Options
) -> Callable[..., tuple[jax.Array, dict, tuple]]:
    """Builds the function that sums loss and gradient over the micro-batches of a step.

        gradient(state, frozen, batch, student_prefix, teacher_kv) -> (loss, gradient, stats)

    `make_step` describes the arguments. The loss is a scalar, the gradient is a tree like
    `state.trained`, and `stats` is the pair of `Aux.tokens` and `Aux.policy`.
    """
    loss = _build_micro_batch_loss(decoder, options)

    def gradient(state, frozen, batch, student_prefix, teacher_kv):
        head, inputs, join = _prepare_micro_batches(frozen, batch, options)

        def accumulate(carry, inputs):
            total, grads = carry
            micro, weight = inputs
            (value, stats), grad = jax.value_and_grad(loss, has_aux=True)(
                state.trained, state, frozen, head, micro, weight, student_prefix, teacher_kv
            )
            return (total + value, jax.tree.map(jnp.add, grads, grad)), stats

        start = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.trained))
        (total, grads), stats = jax.lax.scan(accumulate, start, inputs)
        return total, grads, jax.tree.map(join, stats)

    return gradient


def make_step(
    decoder: transformer.Decoder, tx: optax.GradientTransformation, options: Options
) -> Callable[..., tuple[State, Aux]]:
    """Builds the train step, a pure function that `builders.build_step` compiles.

        step(state, frozen, batch, student_prefix, teacher_kv, lr_factor=1.0) -> (State, Aux)

    The step sums loss and gradient over the micro-batches, updates the trained tree once, and then
    updates the teacher's average. The loss is the sum of weight · value over all tokens.
    `loss_norms.compute_token_weights` normalises the weights over the whole step, so the losses of
    micro-batches add up to the loss of the step.

    Arguments of the step:

      * state: the `State` before the step.
      * frozen: parameters that the run does not train; see `derive_policies`.
      * batch: a `layout.Batch` of all completions of the step. A packed batch already consists of
        micro-batches. Any other batch is cut into `options.micro_batches` micro-batches.
      * student_prefix: int32 [P], the exemplars of the student's prompts, or None.
      * teacher_kv: keys and values of the teacher's prefix, one KV for each policy of
        `list_teacher_mixture`, or None.
      * lr_factor: float scalar that multiplies the update; the guards choose this factor.

    Args:
      decoder: the model.
      tx: the optimizer from `make_optimizer`.
      options: choices that are fixed when the step is compiled.

    Returns:
      The train step. The metrics of a step are float32 scalars, and the per-token values have the
      shape [B, C]. The metric `bad` is 1 if the loss or the gradient is not finite, `no_loss` is 1
      if the gradient counts as zero, and `weights_finite` is 1 if the new State is finite.
    """
    gradient = make_gradient(decoder, options)

    def step(state, frozen, batch, student_prefix, teacher_kv, lr_factor=1.0):
        total, grads, (tokens, policy) = gradient(state, frozen, batch, student_prefix, teacher_kv)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
        moves = finite & (grad_norm > options.min_grad_norm)
        updates, opt_state = tx.update(grads, state.optimizer, state.trained)
        # AdamW's update, weight decay included, is proportional to the learning rate. Scaling the
        # update is therefore the same as scaling the learning rate.
        updates = jax.tree.map(lambda x: x * jnp.asarray(lr_factor, x.dtype), updates)
        trained: Any = optax.apply_updates(state.trained, updates)
        new = trained, opt_state, _update_teacher_average(state.ema, trained, options)
        new = jax.tree.map(lambda new, old: jnp.where(moves, new, old), new, tuple(state[1:]))
        metrics = {
            "loss": total,
            "grad_norm": grad_norm,
            "update_norm": jnp.where(moves, optax.tree.norm(updates), 0.0),
            "tokens": batch.mask_BC.sum().astype(jnp.float32),
            "bad": (~finite).astype(jnp.float32),
            "no_loss": (finite & ~moves).astype(jnp.float32),
            "weights_finite": nonfinite.is_finite(new).astype(jnp.float32),
            **_average_step_divergence(tokens, batch),
            **_average_step_policy_loss(policy, batch),
        }
        return State(state.step + 1, *new), Aux(metrics, tokens, policy)

    return step


def _update_teacher_average(ema: dict | None, trained: dict, options: Options) -> dict | None:
    """Returns decay · ema + (1 - decay) · trained in float32; without an average, returns `ema`.

    In bfloat16, rounding would remove the small updates of an average with a decay of 0.999. The
    two factors of an adapter are averaged separately, as in the published method. The product of
    the averages differs from the average of the products.
    """
    if ema is None or options.teacher != "ema":
        return ema
    decay = jnp.asarray(options.ema_decay, jnp.float32)
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, trained)


def _average_step_tokens(x_BC: jax.Array, mask_BC: jax.Array) -> jax.Array:
    """Returns the mean of x_BC over the tokens of a mask, or 0 for an empty mask."""
    count = jnp.maximum(1, mask_BC.sum()).astype(jnp.float32)
    return jnp.where(mask_BC, x_BC, 0.0).sum() / count


def _average_step_divergence(
    stats: divergence_loss.TokenStats | None, batch: layout.Batch
) -> dict[str, jax.Array]:
    """Returns the means of the divergence's statistics over the tokens with distillation loss.

    The student's entropy is an exception: its mean is over all tokens of the completions.
    """
    if stats is None:
        return {}
    values = {
        "divergence": stats.value_T, "logp_student": stats.logp_student_T,
        "logp_teacher": stats.logp_teacher_T, "entropy_teacher": stats.entropy_teacher_T,
        "clipped_mass": stats.clipped_mass_T,
    }  # fmt: skip
    return {
        **{
            name: _average_step_tokens(value_BC, batch.loss_BC) for name, value_BC in values.items()
        },
        "entropy_student": _average_step_tokens(stats.entropy_student_T, batch.mask_BC),
        "loss_tokens": batch.loss_BC.sum().astype(jnp.float32),
    }


def _average_step_policy_loss(
    stats: PolicyStats | None, batch: layout.Batch
) -> dict[str, jax.Array]:
    """Returns the means of the policy loss's statistics over the tokens with policy loss."""
    if stats is None:
        return {}
    values = {"policy_loss": stats.value_T, "policy_entropy": stats.entropy_T,
              "ratio_clipped": stats.clipped_T, "kl_initial": stats.kl_T}  # fmt: skip
    means = {
        name: _average_step_tokens(value_BC, batch.policy_BC) for name, value_BC in values.items()
    }
    return means | {"policy_tokens": batch.policy_BC.sum().astype(jnp.float32)}
