"""Oracles: the same numbers by another route: one sample, one device, one micro-batch at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import placing
import pytest
from conftest import mostly_slow

from copsd_jax.losses import divergence_loss
from copsd_jax.model import lora, shared_prefix, transformer
from copsd_jax.model import policy as policy_lib
from copsd_jax.runtime import sharding
from copsd_jax.training import layout, micro_batches, train_step

CONFIG = dataclasses.replace(transformer.SHAPES["tiny"], vocab_size=97)
SCALE = 2.0
OPTIONS = train_step.Options(
    trainable="lora",
    teacher="fixed",
    ema_decay=0.9,
    adapter_scale=SCALE,
    divergence=divergence_loss.Divergence(temperature=1.3),
    implementation="chunked",
    chunk=16,
    norm="global_token_mean",
    group=8,
    micro_batches=1,
)
TX = optax.sgd(0.1)


@pytest.fixture(scope="module")
def decoder():
    return transformer.Decoder(CONFIG, jnp.float32)


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(CONFIG, jax.random.key(0), jnp.float32)


def make_adapter(seed: int, size: float = 0.05) -> dict:
    """An adapter whose b is not zero, so that student and initial policy differ."""
    adapter = lora.init_adapter(CONFIG, 4, ("q", "v", "down"), jax.random.key(seed))
    key = jax.random.key(seed + 100)
    return jax.tree.map(lambda x: x + size * jax.random.normal(key, x.shape, jnp.float32), adapter)


def make_samples(seed: int, n: int = 8) -> tuple[list, list, list]:
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, 97, rng.integers(low, high)).tolist()  # noqa: E731
    return (
        [draw(2, 12) for _ in range(n)],
        [draw(10, 25) for _ in range(n)],
        [draw(1, 9) for _ in range(n)],
    )


def run(decoder, params, state, batch, prefix=None, teacher_kv=None, **changes):
    return _jit_step(decoder, **changes)(state, params, batch, prefix, teacher_kv)


@functools.cache
def _jit_step(decoder, **changes):
    return jax.jit(train_step.make_step(decoder, TX, dataclasses.replace(OPTIONS, **changes)))


def row(prompt, completion):
    """ids [1, 40] of a sample alone; what stands behind it, causal attention does not see."""
    ids = [*prompt, *completion]
    return np.asarray([ids + [0] * (40 - len(ids))], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(decoder, params, adapter, ids_1L):
    """Logits [40, V] of one sample alone, differentiable."""
    positions = jnp.arange(ids_1L.shape[1], dtype=jnp.int32)[None]
    stream = transformer.Stream(ids_1L, positions, jnp.ones_like(ids_1L), adapter, SCALE)
    hidden = decoder.apply({"params": params}, (stream,))[0].hidden_BLD
    return transformer.compute_model_logits(hidden, transformer.get_head(params))[0]


def log_softmax_by_hand(decoder, params, adapter, prompt, completion):
    """float64 log-probabilities [n, V] of one sample alone: no padding before it, no gather."""
    z = np.asarray(forward(decoder, params, adapter, row(prompt, completion)), np.float64)
    z = z[len(prompt) - 1 : len(prompt) - 1 + len(completion)] / 1.3
    return (
        z
        - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - z.max(-1, keepdims=True)
    )


def test_bug_04_values_of_a_ragged_batch_equal_those_of_each_sample_alone(decoder, params):
    """Divergence and log-probabilities per token, both sides, prompts of unequal length."""
    adapter = make_adapter(1)
    students, teachers, completions = make_samples(0)
    batch = layout.build_batch(students, teachers, completions)
    state = train_step.init_train_state(adapter, TX, "fixed")
    _, aux = run(decoder, params, state, batch)
    for b, (s, t, c) in list(enumerate(zip(students, teachers, completions, strict=True)))[:3]:
        lp = log_softmax_by_hand(decoder, params, adapter, s, c)
        lq = log_softmax_by_hand(decoder, params, None, t, c)
        n, index = len(c), np.arange(len(c))
        np.testing.assert_allclose(aux.tokens.logp_student_T[b, :n], lp[index, c], atol=2e-5)
        np.testing.assert_allclose(aux.tokens.logp_teacher_T[b, :n], lq[index, c], atol=2e-5)
        kl = (np.exp(lq) * (lq - lp)).sum(-1)
        np.testing.assert_allclose(aux.tokens.value_T[b, :n], kl, atol=2e-5)
    count = sum(map(len, completions))
    mask = np.asarray(batch.mask_BC)
    mean = np.asarray(aux.tokens.value_T)[mask].sum() / count
    np.testing.assert_allclose(aux.metrics["loss"], mean, rtol=1e-5)


def test_equal_contexts_give_no_loss_and_no_gradient(decoder, params):
    """Through the model, in float32, below 1e-6: teacher = student context, b = 0."""
    students, _, completions = make_samples(1)
    adapter = lora.init_adapter(CONFIG, 4, ("q", "v", "down"), jax.random.key(0))
    state = train_step.init_train_state(adapter, TX, "fixed")
    batch = layout.build_batch(students, students, completions)
    _, aux = run(decoder, params, state, batch)
    assert abs(float(aux.metrics["loss"])) < 1e-6
    assert float(aux.metrics["grad_norm"]) < 1e-6
    _, other = run(
        decoder, params, train_step.init_train_state(make_adapter(1), TX, "fixed"), batch
    )
    assert float(other.metrics["grad_norm"]) > 1e-3  # the test can fail


@pytest.mark.slow
@pytest.mark.parametrize("shape", mostly_slow([(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 4, 2)]))
def test_any_mesh_gives_the_numbers_of_one_device(decoder, params, shape):
    config = dataclasses.replace(CONFIG, vocab_size=96)
    decoder = transformer.Decoder(config, jnp.float32)
    params = transformer.init_params(config, jax.random.key(0), jnp.float32)
    samples = make_samples(2)
    batch = jax.tree.map(
        lambda x: np.minimum(x, 95) if x.max() == 96 else x, layout.build_batch(*samples)
    )
    adapter = lora.init_adapter(config, 8, ("q", "o", "down"), jax.random.key(1))
    adapter = jax.tree.map(lambda x: x + 0.03, adapter)
    state = train_step.init_train_state(adapter, TX, "fixed")
    alone, aux = run(decoder, params, state, batch)
    devices = sharding.make_mesh(*shape)
    step = jax.jit(
        train_step.make_step(decoder, TX, OPTIONS),
        out_shardings=(sharding.shardings(state, devices), None),
    )
    with jax.set_mesh(devices):
        spread, spread_aux = step(
            sharding.shard_by_name(state, devices),
            sharding.shard_by_name(params, devices, CONFIG.n_kv_heads),
            placing.place_batch(batch, devices),
            None,
            None,
        )
    np.testing.assert_allclose(spread_aux.metrics["loss"], aux.metrics["loss"], rtol=1e-5)
    for one, many, before in zip(
        *map(jax.tree.leaves, (alone.trained, spread.trained, adapter)), strict=True
    ):
        change = np.linalg.norm(np.asarray(one) - np.asarray(before))
        np.testing.assert_allclose(np.asarray(many), np.asarray(one), atol=1e-4 * change + 1e-9)
    assert spread.trained["q"]["a"].sharding == sharding.shardings(state, devices).trained["q"]["a"]


@pytest.mark.parametrize("norm", mostly_slow(["global_token_mean", "micro_token_mean", "seq_mean"]))
def test_four_micro_batches_equal_one(decoder, params, norm):
    """The normaliser's groups are settings of their own, so accumulation changes nothing."""
    batch = layout.build_batch(*make_samples(3))
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    one, aux = run(decoder, params, state, batch, norm=norm, group=2)
    four, aux4 = run(decoder, params, state, batch, norm=norm, group=2, micro_batches=4)
    np.testing.assert_allclose(aux4.metrics["loss"], aux.metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(aux4.tokens.value_T, aux.tokens.value_T, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), four.trained, one.trained
    )


def test_a_shared_prefix_equals_writing_it_in_front_of_every_prompt(decoder, params):
    """Loss and gradient, also through the prefix's own keys."""
    students, teachers, completions = make_samples(4)
    prefix_s, prefix_t = [5, 6, 7, 8, 9], [11, 12, 13]
    state = train_step.init_train_state(make_adapter(2), TX, "fixed")
    whole = layout.build_batch(
        [prefix_s + s for s in students], [prefix_t + t for t in teachers], completions
    )
    plain, aux = run(decoder, params, state, whole)
    kv = shared_prefix.encode_prefix_ids(decoder, policy_lib.Policy(params), prefix_t)
    batch = layout.build_batch(students, teachers, completions, student_prefix=5, teacher_prefix=3)
    shared, aux_shared = run(decoder, params, state, batch, jnp.asarray(prefix_s, jnp.int32), (kv,))
    np.testing.assert_allclose(aux_shared.metrics["loss"], aux.metrics["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), shared.trained, plain.trained
    )


def test_teachers_are_the_weights_they_are_named_after(decoder, params):
    """fixed: without adapter; live: the student's; ema: the average, which is step 0 at first."""
    students, _, completions = make_samples(5)
    batch = layout.build_batch(students, students, completions)
    adapter, average = make_adapter(1), make_adapter(7)
    by_hand = {"fixed": None, "live": adapter, "ema": average}
    for teacher, weights in by_hand.items():
        state = train_step.init_train_state(adapter, TX, teacher)
        state = state._replace(ema=average) if teacher == "ema" else state
        _, aux = run(decoder, params, state, batch, teacher=teacher)
        lq = log_softmax_by_hand(decoder, params, weights, students[0], completions[0])
        n = len(completions[0])
        np.testing.assert_allclose(
            aux.tokens.logp_teacher_T[0, :n], lq[np.arange(n), completions[0]], atol=2e-5
        )


def test_bug_11_average_begins_at_step_0_and_bug_12_moves_in_float32(decoder, params):
    batch = layout.build_batch(*make_samples(6))
    adapter = make_adapter(1)
    state = train_step.init_train_state(adapter, TX, "ema")
    jax.tree.map(np.testing.assert_array_equal, state.ema, adapter)
    for _ in range(2):
        old = state
        state, _ = run(decoder, params, state, batch, teacher="ema", ema_decay=0.999)
        expected = jax.tree.map(
            lambda e, t: 0.999 * np.asarray(e, np.float64) + 0.001 * np.asarray(t, np.float64),
            old.ema,
            state.trained,
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.ema, expected)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.ema))
    moved = np.asarray(state.ema["q"]["b"]) != np.asarray(adapter["q"]["b"])
    assert moved.mean() > 0.9  # in bfloat16 nothing would move


def test_full_fine_tuning_trains_every_weight_against_the_frozen_copy(decoder, params):
    students, teachers, completions = make_samples(8)
    batch = layout.build_batch(students, teachers, completions)
    state = train_step.init_train_state(jax.tree.map(jnp.copy, params), TX, "fixed")
    new, aux = run(decoder, params, state, batch, trainable="full")
    n = len(completions[0])
    lq = log_softmax_by_hand(decoder, params, None, teachers[0], completions[0])
    np.testing.assert_allclose(
        aux.tokens.logp_teacher_T[0, :n], lq[np.arange(n), completions[0]], atol=2e-5
    )
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(new.trained), strict=True):
        assert (np.asarray(before) != np.asarray(after)).any()
    # The head's gradient is there: a numerical derivative of the loss along the embedding.
    tiny = 1e-3
    direction = jax.random.normal(jax.random.key(3), params["embed"]["embedding"].shape)

    def loss_at(size):
        moved = {**params, "embed": {"embedding": params["embed"]["embedding"] + size * direction}}
        state = train_step.init_train_state(moved, TX, "fixed")
        return float(run(decoder, params, state, batch, trainable="full")[1].metrics["loss"])

    slope = (loss_at(tiny) - loss_at(-tiny)) / (2 * tiny)
    gradient = (params["embed"]["embedding"] - new.trained["embed"]["embedding"]) / 0.1
    np.testing.assert_allclose(float((gradient * direction).sum()), slope, rtol=2e-2)


def test_bug_10_a_step_without_any_token_is_finite(decoder, params):
    batch = layout.build_batch([[1, 2]] * 8, [[3, 4]] * 8, [[]] * 8)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    new, aux = run(decoder, params, state, batch)
    assert float(aux.metrics["loss"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, new.trained, state.trained)


@pytest.mark.parametrize(
    "schedule,warmup,expected",
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1.0, 0.853553, 0.5, 0.146447]),
        ("linear", 2, [1 / 3, 2 / 3, 1.0, 0.5]),
        ("cosine", 9, [0.1, 0.2, 0.3, 0.4]),  # a run that ends during its warm-up
    ],
)
def test_learning_rates_by_hand(schedule, warmup, expected):
    _, rate = train_step.make_optimizer(
        steps=4, lr=1.0, schedule=schedule, warmup=warmup, weight_decay=0.0, b1=0.9, b2=0.99,
        eps=1e-8, max_grad_norm=0.0,
    )  # fmt: skip
    np.testing.assert_allclose([rate(k) for k in range(4)], expected, atol=1e-6)


def test_micro_batches_by_hand():
    """B = 4, n = 2: sample b is row b // 2 of micro-batch b % 2, and its index moves along."""
    batch = layout.build_batch([[1, 2], [3], [4, 5, 6], [7]], [[8]] * 4, [[1], [2, 3], [4], [5]])
    cut, join = micro_batches.split_batch(batch, 2), micro_batches.make_cuts(batch, 2)[1]
    for b in range(4):
        micro, row = b % 2, b // 2
        np.testing.assert_array_equal(cut.student.tokens_BL[micro, row], batch.student.tokens_BL[b])
        flat = np.asarray(cut.student.tokens_BL[micro]).reshape(-1)
        whole = np.asarray(batch.student.tokens_BL).reshape(-1)
        n = int(batch.mask_BC[b].sum())
        at, before = cut.student.gather_BC[micro, row, :n], batch.student.gather_BC[b, :n]
        assert (flat[at] == whole[before]).all()
        assert (flat[at + 1] == batch.completion_BC[b, :n]).all()
    np.testing.assert_array_equal(join(cut.mask_BC), batch.mask_BC)


@pytest.mark.slow
def test_micro_batches_on_eight_devices_equal_one(decoder, params):
    batch = layout.build_batch(*make_samples(9, n=16))
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    one, aux = run(decoder, params, state, batch, micro_batches=2)
    devices = sharding.make_mesh(8, 1, 1)
    options = dataclasses.replace(OPTIONS, micro_batches=2)
    step = jax.jit(
        train_step.make_step(decoder, TX, options),
        out_shardings=(sharding.shardings(state, devices), None),
    )
    with jax.set_mesh(devices):
        placed = (
            sharding.shard_by_name(state, devices),
            sharding.shard_by_name(params, devices, CONFIG.n_kv_heads),
        )
        many, spread = step(*placed, placing.place_batch(batch, devices), None, None)
    np.testing.assert_allclose(spread.tokens.value_T, aux.tokens.value_T, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), many.trained, one.trained
    )


def test_bug_06_an_end_token_that_equals_padding_is_trained(decoder, params):
    """Token 0 fills empty places; as a sampled end token it has value and gradient."""
    students, teachers, _ = make_samples(10)
    batch = layout.build_batch(students, teachers, [[5, 0]] + [[]] * 7)
    state = train_step.init_train_state(make_adapter(1), TX, "fixed")
    _, aux = run(decoder, params, state, batch)
    assert float(aux.metrics["tokens"]) == 2
    lp = log_softmax_by_hand(decoder, params, state.trained, students[0], [5, 0])
    np.testing.assert_allclose(aux.tokens.logp_student_T[0, :2], lp[[0, 1], [5, 0]], atol=2e-5)
    only_end = batch._replace(mask_BC=batch.mask_BC & (np.arange(batch.mask_BC.shape[1]) == 1))
    _, aux = run(decoder, params, state, only_end)
    assert float(aux.tokens.value_T[0, 1]) > 0
    assert float(aux.metrics["grad_norm"]) > 0


@pytest.mark.slow
def test_the_divergence_falls_on_a_batch_that_stays():
    """Thirty steps towards the teacher's context halve the divergence."""
    decoder = transformer.Decoder(CONFIG, jnp.float32)
    params = transformer.init_params(CONFIG, jax.random.key(5), jnp.float32)
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)  # contexts must matter
    batch = layout.build_batch(*make_samples(11))
    tx = optax.adam(1e-2)
    values = []
    with jax.numpy_dtype_promotion("standard"):  # which AdamW relies on
        state = train_step.init_train_state(make_adapter(1, 0.01), tx, "fixed")
        step = jax.jit(train_step.make_step(decoder, tx, OPTIONS))
        for _ in range(30):
            state, aux = step(state, params, batch, None, None)
            values.append(float(aux.metrics["loss"]))
    assert values[-1] < values[0] / 2
