"""Oracles: the policy loss and the mixed teacher from the plain forward of each sample alone, and
sums of the updates of separate runs (plain gradient descent is linear in the loss)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mostly_slow
from test_train_step import CONFIG, OPTIONS, TX, forward, make_adapter, make_samples, row, run

from copsd_jax.losses import divergence_loss
from copsd_jax.model import transformer
from copsd_jax.training import layout, train_step

GRPO = train_step.PolicyLoss(
    kind="surrogate", weight=1.0, temperature=0.9, norm="seq_mean_all", length=8,
    clip_low=0.2, clip_high=0.28,
)  # fmt: skip


@pytest.fixture(scope="module")
def decoder():
    return transformer.Decoder(CONFIG, jnp.float32)


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(CONFIG, jax.random.key(0), jnp.float32)


def make_batch(seed, teacher=True):
    students, teachers, completions = make_samples(seed)
    batch = layout.build_batch(students, teachers if teacher else None, completions)
    rng = np.random.default_rng(seed)
    advantage = rng.normal(size=(len(completions), 1)) * batch.mask_BC
    return (students, teachers, completions), batch._replace(
        policy_BC=batch.mask_BC,
        advantage_BC=advantage.astype(np.float32),
        logp_rollout_BC=np.where(
            batch.mask_BC, rng.normal(-4.6, 0.3, batch.mask_BC.shape), 0
        ).astype(np.float32),
    )


def logits(decoder, params, adapter, prompt, completion):
    """float64 [n, V] of the completion's tokens."""
    z = np.asarray(forward(decoder, params, adapter, row(prompt, completion)), np.float64)
    return z[len(prompt) - 1 : len(prompt) - 1 + len(completion)]


def summed(one, adapter, samples):
    """(value, gradient) of the sum over samples of `one(adapter, *sample)`, one after the other."""
    graded = jax.jit(jax.value_and_grad(one))
    found = [graded(adapter, *sample) for sample in samples]
    return jax.tree.map(lambda *each: sum(np.asarray(x, np.float64) for x in each), *found)


def by_hand(decoder, params, samples, batch, settings, divisor):
    """loss(adapter) with its gradient, sample by sample; `divisor(n)`: of a token's value."""
    students, _, completions = samples
    index = np.arange(batch.mask_BC.shape[1])

    def one(adapter, ids_1L, first, tokens_N, mask_N, rollout_N, adv_N, weight):
        at = first + index
        z = forward(decoder, params, adapter, ids_1L)[at] / settings.temperature
        lp = jax.nn.log_softmax(z)[index, tokens_N]
        base = forward(decoder, params, None, ids_1L)[at] / settings.temperature
        ref = jax.nn.log_softmax(base)[index, tokens_N]
        old = jax.lax.stop_gradient(lp) if settings.old == "trainer" else rollout_N
        ratio = jnp.exp(lp - old)
        bounded = jnp.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
        value = -jnp.minimum(ratio * adv_N, bounded * adv_N)
        if settings.rollout_clip:
            mismatch = jnp.exp(jax.lax.stop_gradient(lp) - rollout_N)
            value = value * jnp.minimum(mismatch, settings.rollout_clip)
        if settings.kl:
            value = value + settings.kl * (jnp.exp(ref - lp) - (ref - lp) - 1)
        return jnp.sum(jnp.where(mask_N, value, 0.0)) * weight

    def each():
        for b, (prompt, completion) in enumerate(zip(students, completions, strict=True)):
            n = len(completion)
            tokens = np.asarray(completion + [0] * (len(index) - n), np.int32)
            yield (
                row(prompt, completion), np.int32(len(prompt) - 1), tokens, index < n,
                batch.logp_rollout_BC[b], batch.advantage_BC[b], np.float32(1 / divisor(n)),
            )  # fmt: skip

    return lambda adapter: summed(one, adapter, each())


@pytest.mark.parametrize(
    "changes, divisor",
    [
        ({}, lambda B, tokens, n: B * n),
        pytest.param(
            {"norm": "global_token_mean", "old": "sampler"},
            lambda B, tokens, n: tokens,
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"norm": "constant", "kl": 0.3, "rollout_clip": 1.1},
            lambda B, tokens, n: B * 8,
            marks=pytest.mark.long,
        ),
    ],
    ids=["grpo", "dapo off policy", "dr grpo with kl"],
)
def test_policy_loss_and_its_gradient(decoder, params, changes, divisor):
    settings = dataclasses.replace(GRPO, **changes)
    samples, batch = make_batch(1, teacher=False)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    new, aux = run(decoder, params, state, batch, divergence=None, policy=settings, micro_batches=2)
    tokens = int(batch.mask_BC.sum())
    loss = by_hand(
        decoder, params, samples, batch, settings, lambda n: divisor(len(samples[0]), tokens, n)
    )
    value, grad = loss(state.trained)
    np.testing.assert_allclose(aux.metrics["loss"], value, rtol=2e-5, atol=1e-6)
    for before, after, g in zip(
        *map(jax.tree.leaves, (state.trained, new.trained, grad)), strict=True
    ):
        largest = float(np.abs(g).max())
        np.testing.assert_allclose((before - after) / 0.1, g, atol=2e-4 * largest + 1e-7)
    assert aux.tokens is None
    assert aux.policy.logp_T.shape == batch.mask_BC.shape


def test_cross_entropy_is_that_of_the_completion_alone(decoder, params):
    settings = train_step.PolicyLoss("nll", 1.0, 1.0, "global_token_mean", 1)
    samples, batch = make_batch(2, teacher=False)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    _, aux = run(decoder, params, state, batch, divergence=None, policy=settings)
    total, count = 0.0, 0
    for prompt, _, completion in zip(*samples, strict=True):
        z = logits(decoder, params, state.trained, prompt, completion)
        lp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        total -= lp[np.arange(len(completion)), completion].sum()
        count += len(completion)
    np.testing.assert_allclose(aux.metrics["loss"], total / count, rtol=1e-5)


@pytest.mark.long
def test_a_mixture_updates_by_the_mixture_of_both_updates(decoder, params):
    _, batch = make_batch(3)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    half = {"policy": dataclasses.replace(GRPO, weight=0.3), "weight": 0.7}
    mixed, aux = run(decoder, params, state, batch, **half)
    distilled, aux_d = run(decoder, params, state, batch)
    rewarded, aux_p = run(decoder, params, state, batch, divergence=None, policy=GRPO)
    np.testing.assert_allclose(
        aux.metrics["loss"],
        0.7 * aux_d.metrics["loss"] + 0.3 * aux_p.metrics["loss"],
        rtol=1e-5,
    )
    for start, mix, d, p in zip(
        *(jax.tree.leaves(x.trained) for x in (state, mixed, distilled, rewarded)), strict=True
    ):
        expected = 0.7 * (d - start) + 0.3 * (p - start)
        np.testing.assert_allclose(mix - start, expected, atol=3e-7)


@pytest.mark.long
def test_routed_tokens_carry_one_loss_each(decoder, params):
    """Completions 0-3 distilled, 4-7 with policy loss: as two batches on their own."""
    _, batch = make_batch(4)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    first = (np.arange(8) < 4)[:, None]
    routed = batch._replace(loss_BC=batch.mask_BC & first, policy_BC=batch.mask_BC & ~first)
    policy = {"policy": dataclasses.replace(GRPO, weight=0.5), "weight": 0.5}
    both, _ = run(decoder, params, state, routed, **policy)
    only_d, _ = run(decoder, params, state, routed, weight=0.5)
    only_p, _ = run(decoder, params, state, routed, divergence=None, policy=policy["policy"])
    for start, b, d, p in zip(
        *(jax.tree.leaves(x.trained) for x in (state, both, only_d, only_p)), strict=True
    ):
        np.testing.assert_allclose(b - start, (d - start) + (p - start), atol=3e-7)


@pytest.mark.long
@pytest.mark.parametrize("trainable", mostly_slow(["lora", "full"]))
def test_trust_region_mixes_the_logits_of_initial_and_current_policy(decoder, params, trainable):
    students, teachers, completions = make_samples(5)
    batch = layout.build_batch(students, teachers, completions)
    if trainable == "lora":
        current, adapter, moved = make_adapter(1), make_adapter(1), params
    else:
        noise = lambda x: x + 0.02 * jax.random.normal(jax.random.key(3), x.shape, x.dtype)  # noqa: E731
        current = jax.tree.map(noise, params)
        adapter, moved = None, current
    state = train_step.init_train_state(current, TX, "trust_region")
    changes = {"teacher": "trust_region", "rho": 0.3, "trainable": trainable}
    _, aux = run(decoder, params, state, batch, **changes)
    for b, (prompt, completion) in enumerate(zip(teachers, completions, strict=True)):
        initial = logits(decoder, params, None, prompt, completion)
        live = logits(decoder, moved, adapter, prompt, completion)
        mixed = (0.7 * initial + 0.3 * live) / 1.3
        lq = mixed - np.log(np.exp(mixed).sum(-1, keepdims=True))
        expected = lq[np.arange(len(completion)), completion]
        np.testing.assert_allclose(
            aux.tokens.logp_teacher_T[b, : len(completion)], expected, atol=3e-5
        )


def test_rho_zero_is_the_fixed_teacher(decoder, params):
    _, batch = make_batch(6)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    fixed, _ = run(decoder, params, state, batch)
    region, _ = run(decoder, params, state, batch, teacher="trust_region", rho=0.0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), fixed.trained, region.trained
    )


def test_tokens_without_loss_are_scored_but_move_nothing(decoder, params):
    """A correct prefix: its values are reported, and changing what the teacher would say of it (by
    other weights of the loss) changes no gradient."""
    samples, batch = make_batch(7)
    suffix = batch.mask_BC & (np.arange(batch.mask_BC.shape[1]) >= 3)
    cut = batch._replace(loss_BC=suffix)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    _, aux_whole = run(decoder, params, state, batch)
    new, aux = run(decoder, params, state, cut)
    np.testing.assert_allclose(aux.tokens.value_T, aux_whole.tokens.value_T, atol=1e-7)
    assert np.abs(np.asarray(aux.tokens.value_T)[batch.mask_BC & ~suffix]).min() > 0
    value = np.asarray(aux.tokens.value_T, np.float64)
    np.testing.assert_allclose(aux.metrics["loss"], value[suffix].mean(), rtol=1e-5)
    # The gradient by hand, from suffix tokens alone.
    students, teachers, completions = samples

    index = np.arange(batch.mask_BC.shape[1])

    def one(adapter, student_1L, of_student, teacher_1L, of_teacher, mask_N):
        z = forward(decoder, params, adapter, student_1L)[of_student + index]
        z_teacher = forward(decoder, params, None, teacher_1L)[of_teacher + index]
        lp, lq = jax.nn.log_softmax(z / 1.3), jax.nn.log_softmax(z_teacher / 1.3)
        return jnp.sum(jnp.where(mask_N[:, None], jnp.exp(lq) * (lq - lp), 0.0))

    each = (
        (row(s, c), np.int32(len(s) - 1), row(t, c), np.int32(len(t) - 1), suffix[b])
        for b, (s, t, c) in enumerate(zip(students, teachers, completions, strict=True))
    )
    _, grad = summed(one, state.trained, each)
    grad = jax.tree.map(lambda g: g / suffix.sum(), grad)
    for before, after, g in zip(
        *map(jax.tree.leaves, (state.trained, new.trained, grad)), strict=True
    ):
        largest = float(np.abs(g).max())
        np.testing.assert_allclose((before - after) / 0.1, g, atol=2e-4 * largest + 1e-7)


def test_the_learning_rate_factor_scales_the_update(decoder, params):
    _, batch = make_batch(8)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    step = jax.jit(train_step.make_step(decoder, TX, OPTIONS))
    whole, _ = step(state, params, batch, None, None)
    half, _ = step(state, params, batch, None, None, np.float32(0.5))
    for start, a, b in zip(
        *(jax.tree.leaves(x.trained) for x in (state, whole, half)), strict=True
    ):
        np.testing.assert_allclose(b - start, 0.5 * (a - start), atol=1e-7)


@pytest.mark.long
def test_the_importance_weight_is_that_of_the_sampler(decoder, params):
    _, batch = make_batch(9)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    settings = divergence_loss.Divergence(
        temperature=1.3, rollout_clip=1.2, sampling_temperature=0.9
    )
    _, aux = run(decoder, params, state, batch, divergence=settings)
    mask = batch.mask_BC
    gap = np.asarray(aux.tokens.logp_sampling_T, np.float64) - batch.logp_rollout_BC
    expected = np.minimum(np.exp(np.clip(gap, -20, 20)), 1.2)[mask]
    np.testing.assert_allclose(np.asarray(aux.tokens.ratio_T)[mask], expected, rtol=1e-4)
    assert expected.min() < 1.2 == expected.max()
