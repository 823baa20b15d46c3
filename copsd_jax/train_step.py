"""One optimizer step: both layouts, the divergence, gradients over micro-batches, update, EMA.

`make` returns a pure function of (state, frozen, batch, ...). What is trained is one tree, whatever
it is: LoRA adapters, or all parameters. The teacher is a choice of weights in `policies`, nothing
more.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from copsd_jax import layout, losses, model
from copsd_jax.sampler import engine


class State(NamedTuple):
    """All that a step changes. `trained` and `ema` are float32 trees of one structure."""

    step: jax.Array  # int32 scalar: steps done
    trained: dict
    optimizer: optax.OptState
    ema: dict | None  # teacher.weights=ema only; equals `trained` at step 0


@dataclasses.dataclass(frozen=True)
class Options:
    """Static choices of a step."""

    trainable: str  # 'lora' | 'full'
    teacher: str  # 'fixed' | 'ema' | 'live'
    ema_decay: float
    adapter_scale: float
    divergence: losses.Divergence
    implementation: str  # 'dense' | 'chunked'
    chunk: int
    norm: str
    group: int  # completions of a group of micro_token_mean
    micro_batches: int


class Policy(NamedTuple):
    """Weights to run the model with: base parameters, and an adapter or None."""

    params: dict
    adapter: dict | None


class Aux(NamedTuple):
    """What a step measured: scalars, and per-token values `[B, C]` in the batch's order."""

    metrics: dict[str, jax.Array]
    tokens: losses.TokenStats


def optimizer(
    *,
    steps: int,
    lr: float,
    schedule: str,
    warmup: int,
    weight_decay: float,
    b1: float,
    b2: float,
    eps: float,
    max_grad_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a global-norm clip, and its learning rate as a function of the step.

    Warm-up rises linearly to `lr`; then constant, linear to 0 at `steps`, or cosine to 0 there.
    Step k (from 0) of n linear steps without warm-up uses lr * (1 - k / n).
    """
    decay = max(1, steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "linear": lambda: optax.linear_schedule(lr, 0.0, decay),
        "cosine": lambda: optax.cosine_decay_schedule(lr, decay),
    }[schedule]()
    # Step 0 of a warm-up already moves: (k + 1) / (warmup + 1) of lr.
    rise = optax.linear_schedule(lr / (warmup + 1), lr, warmup) if warmup else None
    rate = optax.join_schedules([rise, after], [warmup]) if rise else after
    chain = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    chain.append(optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))
    return optax.chain(*chain), rate


def init(trained: dict, tx: optax.GradientTransformation, teacher: str) -> State:
    """State at step 0. The average begins as a copy of what is trained, before any update."""
    ema = jax.tree.map(jnp.copy, trained) if teacher == "ema" else None
    return State(jnp.zeros((), jnp.int32), trained, tx.init(trained), ema)


def policies(state: State, frozen: dict, options: Options, dtype: jnp.dtype) -> tuple:
    """(student, teacher) of this state.

    LoRA: `frozen` is the base; `fixed` is the base without adapter, which is the initial policy
    since adapters begin at 0. Full: `frozen` is the initial weights for `fixed`, unused otherwise.
    """
    if options.trainable == "lora":
        teacher = {"fixed": None, "live": state.trained, "ema": state.ema}[options.teacher]
        return Policy(frozen, state.trained), Policy(frozen, teacher)
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)  # noqa: E731
    student = cast(state.trained)
    if options.teacher == "fixed":
        return Policy(student, None), Policy(frozen, None)
    teacher = student if options.teacher == "live" else cast(state.ema)
    return Policy(student, None), Policy(teacher, None)


def _hidden(
    decoder: model.Decoder,
    sides: list[tuple[Policy, layout.Side, model.KV | None]],
    scale: float,
) -> list[jax.Array]:
    """Hidden states `[B x C, D]` that predict the completion tokens, for each side.

    Sides with the same base parameters go through the layers together.
    """
    streams = [
        model.Stream(
            side.tokens_BL, side.positions_BL, side.segments_BL, policy.adapter, scale, prefix
        )
        for policy, side, prefix in sides
    ]
    if all(policy.params is sides[0][0].params for policy, _, _ in sides):
        outputs = decoder.apply({"params": sides[0][0].params}, tuple(streams))
    else:
        outputs = [
            decoder.apply({"params": policy.params}, (stream,))[0]
            for (policy, _, _), stream in zip(sides, streams, strict=True)
        ]
    gathered = []
    for output, (_, side, _) in zip(outputs, sides, strict=True):
        flat = output.hidden_BLD.reshape(-1, output.hidden_BLD.shape[-1])
        gathered.append(flat[side.gather_BC.reshape(-1)])
    return gathered


def make(
    decoder: model.Decoder, tx: optax.GradientTransformation, options: Options
) -> Callable[..., tuple[State, Aux]]:
    """The step: `step(state, frozen, batch, student_prefix, teacher_prefix) -> (state, Aux)`.

    `batch` is a layout.Batch of all the step's completions; `student_prefix` int32 [P] or None;
    `teacher_prefix` the KV of the teacher's prefix under the teacher's weights, or None. The loss
    is sum(weight x divergence) with the weights of `losses.token_weights` over the whole step, so
    that micro-batches add up to it.
    """

    def loss(trained, state, frozen, micro, weight_BC, student_prefix, teacher_kv):
        student, teacher = policies(state._replace(trained=trained), frozen, options, decoder.dtype)
        teacher = jax.lax.stop_gradient(teacher)
        if options.trainable == "lora":
            teacher = teacher._replace(params=frozen)  # the same object: one pass for both sides
        student_kv = None
        if student_prefix is not None:
            student_kv = engine.encode(
                decoder,
                student.params,
                student_prefix[None],
                student.adapter,
                options.adapter_scale,
            )
        hidden_s, hidden_t = _hidden(
            decoder,
            [(student, micro.student, student_kv), (teacher, micro.teacher, teacher_kv)],
            options.adapter_scale,
        )
        return losses.divergence(
            hidden_s,
            jax.lax.stop_gradient(hidden_t),
            model.head(student.params),
            jax.lax.stop_gradient(model.head(teacher.params)),
            micro.completion_BC.reshape(-1),
            weight_BC.reshape(-1),
            options.divergence,
            implementation=options.implementation,
            chunk=options.chunk,
            train_head=options.trainable == "full",
        )

    def step(state, frozen, batch, student_prefix, teacher_kv):
        n = options.micro_batches
        B, C = batch.mask_BC.shape
        weight_BC = losses.token_weights(batch.mask_BC, options.norm, options.group)
        micro_batches = _split(batch, n)

        def accumulate(carry, inputs):
            total, grads = carry
            micro, weight = inputs
            (value, stats), grad = jax.value_and_grad(loss, has_aux=True)(
                state.trained, state, frozen, micro, weight, student_prefix, teacher_kv
            )
            return (total + value, jax.tree.map(jnp.add, grads, grad)), stats

        zeros = jax.tree.map(jnp.zeros_like, state.trained)
        inputs = (micro_batches, _cut(weight_BC, n))
        start = (jnp.zeros((), jnp.float32), zeros)
        (total, grads), stats = jax.lax.scan(accumulate, start, inputs)
        stats = jax.tree.map(lambda x: _join(x.reshape(n, B // n, C)), stats)
        updates, opt_state = tx.update(grads, state.optimizer, state.trained)
        trained: Any = optax.apply_updates(state.trained, updates)
        new = State(state.step + 1, trained, opt_state, _average(state.ema, trained, options))
        metrics = {
            "loss": total,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            **_means(stats, batch.mask_BC),
        }
        return new, Aux(metrics, stats)

    return step


def _cut(x: jax.Array, n: int) -> jax.Array:
    """[B, ...] as [n, B / n, ...]; row b becomes row b // n of micro-batch b % n.

    Strided, so that each device's rows of every micro-batch are rows that it holds already.
    """
    return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_cut`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _split(batch: layout.Batch, n: int) -> layout.Batch:
    """All arrays cut into n micro-batches; gather indices, flat in B x L, become local ones.

    B = 4, n = 2, L = 10: sample 3 is row 1 of micro-batch 1, so its index 34 becomes 14.
    """

    def side(s: layout.Side) -> layout.Side:
        B, L = s.tokens_BL.shape
        b = jnp.arange(B, dtype=jnp.int32)
        local = s._replace(gather_BC=s.gather_BC - ((b - b // n) * L)[:, None])
        return jax.tree.map(lambda x: _cut(x, n), local)

    return layout.Batch(
        side(batch.student),
        side(batch.teacher),
        _cut(batch.completion_BC, n),
        _cut(batch.mask_BC, n),
    )


def _average(ema: dict | None, trained: dict, options: Options) -> dict | None:
    """decay x average + (1 - decay) x new, in float32: in bfloat16 it would not move at .999.

    Of an adapter the two factors are averaged, each on its own, as published; the product of the
    averages is not the average of the products.
    """
    if ema is None:
        return None
    decay = jnp.asarray(options.ema_decay, jnp.float32)
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, trained)


def _means(stats: losses.TokenStats, mask_BC: jax.Array) -> dict[str, jax.Array]:
    """Means over completion tokens."""
    count = jnp.maximum(1, mask_BC.sum()).astype(jnp.float32)
    mean = lambda x: jnp.where(mask_BC, x, 0.0).sum() / count  # noqa: E731
    return {
        "divergence": mean(stats.value_T),
        "logp_student": mean(stats.logp_student_T),
        "logp_teacher": mean(stats.logp_teacher_T),
        "entropy_student": mean(stats.entropy_student_T),
        "entropy_teacher": mean(stats.entropy_teacher_T),
        "clipped_mass": mean(stats.clipped_mass_T),
        "tokens": mask_BC.sum().astype(jnp.float32),
    }
