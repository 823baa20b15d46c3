"""What a step leaves alone. Oracle: the state before, and the same steps without the bad one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from conftest import mostly_slow
from test_packed_rows import KEPT
from test_train_step import CONFIG, OPTIONS, make_adapter, make_samples

from copsd_jax.config import settings as config_lib
from copsd_jax.losses import divergence_loss
from copsd_jax.losses.pallas import dispatch
from copsd_jax.model import lora, transformer
from copsd_jax.runtime import sharding
from copsd_jax.training import builders, layout, row_packing, run_plan, train_step

optax_promotes = runs.optax_promotes

OPTIONS = dataclasses.replace(OPTIONS, teacher="ema", ema_decay=0.9)


@pytest.fixture(scope="module")
def decoder():
    return transformer.Decoder(CONFIG, jnp.float32)


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(CONFIG, jax.random.key(0), jnp.float32)


def optimizer(lr=0.01, **settings):
    settings = {"weight_decay": 0.1, "max_grad_norm": 1.0} | settings
    return train_step.make_optimizer(
        steps=8, lr=lr, schedule="linear", warmup=2, b1=0.9, b2=0.99, eps=1e-8, **settings
    )[0]  # fmt: skip


@jax.custom_vjp
def spoil(x):
    """The identity; one number of its gradient is NaN."""
    return x


spoil.defvjp(lambda x: (x, None), lambda _, g: (g.at[0, 1, 1].set(jnp.nan),))


def spoiled(build):
    """`_build_micro_batch_loss` with a gradient that is NaN in one number of q/a."""

    def built(decoder, options):
        loss = build(decoder, options)

        def inner(trained, *args):
            q = trained["q"] | {"a": spoil(trained["q"]["a"])}
            return loss(trained | {"q": q}, *args)

        return inner

    return built


@pytest.fixture(scope="module")
def steps(decoder):
    """The good step, and the step whose gradient is not finite though its loss is."""
    tx = optimizer()
    good = jax.jit(train_step.make_step(decoder, tx, OPTIONS))
    with pytest.MonkeyPatch.context() as patch:
        build = spoiled(train_step._build_micro_batch_loss)
        patch.setattr(train_step, "_build_micro_batch_loss", build)
        bad = jax.jit(train_step.make_step(decoder, tx, OPTIONS))
    return tx, good, bad


def begin(tx):
    state = train_step.init_train_state(make_adapter(1), tx, "ema")
    return state._replace(ema=make_adapter(2))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_bad_step_advances_the_count_alone(steps, params):
    tx, good, bad = steps
    first, second = (layout.build_batch(*make_samples(seed)) for seed in (0, 1))
    before, _ = good(begin(tx), params, first, None, None)
    after, aux = bad(before, params, second, None, None)
    assert np.isfinite(aux.metrics["loss"])
    assert np.isnan(aux.metrics["grad_norm"])
    flags = {name: float(aux.metrics[name]) for name in ("bad", "no_loss", "weights_finite")}
    assert flags == {"bad": 1, "no_loss": 0, "weights_finite": 1}
    assert float(aux.metrics["update_norm"]) == 0
    assert (int(before.step), int(after.step)) == (1, 2)
    assert_same(after[1:], before[1:])
    # Momentum, schedule and average go on as if the bad step had not been.
    following, aux = good(after, params, second, None, None)
    without, known = good(before, params, second, None, None)
    assert_same(following[1:], without[1:])
    assert_same(aux, known)
    assert float(aux.metrics["bad"]) == float(aux.metrics["no_loss"]) == 0
    assert not np.array_equal(following.trained["q"]["a"], after.trained["q"]["a"])


def test_without_loss_momentum_and_decay_stay(steps, params):
    tx, good, _ = steps
    batch = layout.build_batch(*make_samples(0))
    before, _ = good(begin(tx), params, batch, None, None)
    none = batch._replace(loss_BC=np.zeros_like(batch.loss_BC))
    after, aux = good(before, params, none, None, None)
    assert_same(after[1:], before[1:])
    flags = {name: float(aux.metrics[name]) for name in ("bad", "no_loss", "grad_norm")}
    assert flags == {"bad": 0, "no_loss": 1, "grad_norm": 0}
    assert int(after.step) == 2


def test_a_gradient_counts_up_to_the_floor_as_zero(steps, decoder, params):
    tx, good, _ = steps
    batch, state = layout.build_batch(*make_samples(0)), begin(tx)
    moved, aux = good(state, params, batch, None, None)
    norm = np.float32(aux.metrics["grad_norm"])
    for floor, still in ((norm, True), (np.nextafter(norm, np.float32(0)), False)):
        options = dataclasses.replace(OPTIONS, min_grad_norm=float(floor))
        step = jax.jit(train_step.make_step(decoder, tx, options))
        after, aux = step(state, params, batch, None, None)
        assert float(aux.metrics["no_loss"]) == still
        assert_same(after[1:], state[1:] if still else moved[1:])


def test_weights_that_are_not_finite_are_reported(steps, decoder, params):
    """A NaN in one weight or in the average; and an update that is too large for float32."""
    tx, good, _ = steps
    batch, state = layout.build_batch(*make_samples(0)), begin(tx)
    lost = state.trained["q"]["b"].at[0, 0, 0].set(jnp.nan)
    tree = state.trained | {"q": state.trained["q"] | {"b": lost}}
    for broken, bad in ((state._replace(trained=tree), 1), (state._replace(ema=tree), 1)):
        _, aux = good(broken, params, batch, None, None)
        assert float(aux.metrics["bad"]) == bad
        assert float(aux.metrics["weights_finite"]) == 0
    far = optimizer(lr=3e38, weight_decay=1e3)
    _, aux = jax.jit(train_step.make_step(decoder, far, OPTIONS))(
        begin(far), params, batch, None, None
    )
    assert float(aux.metrics["bad"]) == 0
    assert float(aux.metrics["weights_finite"]) == 0


# ---- settings of memory ------------------------------------------------------------------------


@pytest.mark.long
def test_micro_batches_do_not_change_the_gradient_at_the_defaults():
    """Lengths of 1 to 11; with the old default norm, the gradients were 34 % apart."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(1, 97, n).tolist()  # noqa: E731
    lengths = [*range(1, 12), 5]
    batch = layout.build_batch(
        [draw(4) for _ in lengths], [draw(9) for _ in lengths], [draw(n) for n in lengths]
    )
    decoder = transformer.Decoder(CONFIG, jnp.float32)
    params = transformer.init_params(CONFIG, jax.random.key(0), jnp.float32)
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    found = []
    for size in (0, 1, 2, 4):
        c = config_lib.default()
        c.train.batch, c.train.micro_batch = len(lengths), size
        plan = run_plan.ProgramPlan(c, mesh, jnp.float32, CONFIG)
        gradient = jax.jit(train_step.make_gradient(decoder, builders.build_options(plan)))
        state = train_step.init_train_state(make_adapter(1), KEPT, "fixed")
        _, grads, _ = gradient(state, params, batch, None, None)
        found.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)]))
    for other in found[1:]:
        assert np.linalg.norm(other - found[0]) <= 1e-5 * np.linalg.norm(found[0])


def test_a_trust_region_mixes_in_float32():
    """Oracle: the mixed logits in float64, of hidden states and a head in bfloat16."""
    shares, width = [0.95, 0.05], 512
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    head_VD, other_VD = draw(300, width), draw(300, width)
    first_TD = draw(40, width)
    second_TD = first_TD + draw(40, width) * jnp.bfloat16(0.1)
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    for heads in ([head_VD, head_VD], [head_VD, other_VD]):
        mixed_TD, mixed_VD = train_step._mix_teacher_states(shares, [first_TD, second_TD], heads)
        assert mixed_TD.dtype == jnp.bfloat16
        want = sum(
            share * wide(h) @ wide(head).T
            for share, h, head in zip(shares, (first_TD, second_TD), heads, strict=True)
        )
        got = wide(mixed_TD) @ wide(mixed_VD).T
        # The slope is the sum of the shares: bfloat16 shares gave .9993.
        slope = (got * want).sum() / (want * want).sum()
        assert abs(slope - 1) < 1e-4
        assert np.abs(got - want).max() < 0.01 * np.abs(want).max()
    same_TD, _ = train_step._mix_teacher_states(shares, [first_TD, first_TD], [head_VD, head_VD])
    np.testing.assert_array_equal(wide(same_TD), wide(first_TD))


# ---- equal sides -------------------------------------------------------------------------------

# Twelve times the largest norm that was measured: 8.1e-9, of all weights in float32.
BOUND = 1e-7


@pytest.mark.parametrize("trainable", ["lora", pytest.param("full", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("pack", mostly_slow(["shared", "rows", "off"]))
@pytest.mark.parametrize("implementation", mostly_slow(["chunked", "dense", "pallas_tpu"]))
def test_equal_sides_give_no_loss(monkeypatch, implementation, pack, dtype, trainable):
    """With an adapter, whose head both sides share, exactly none; for all weights up to rounding.

    The default of train.min_grad_norm is the bound, so that such a step changes nothing.
    """
    assert config_lib.default().train.min_grad_norm == BOUND
    kernel = dispatch.KernelOptions(interpret=True)
    monkeypatch.setattr(divergence_loss, "KernelOptions", lambda **_: kernel)
    decoder = transformer.Decoder(CONFIG, dtype)
    params = transformer.init_params(CONFIG, jax.random.key(0), dtype)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    if trainable == "lora":
        trained = lora.init_adapter(CONFIG, 4, lora.TARGETS, jax.random.key(1))
    prompts, _, completions = make_samples(3)
    batch = layout.build_batch(prompts, prompts, completions)
    if pack != "off":
        lengths, sides = layout.measure_prompts(batch, pack == "shared")
        plan = row_packing.plan_rows(
            lengths, sides, shards=1, micros=1, budget=0, row=0, one_per_row=False
        )
        batch = layout.pack_rows(batch, plan, pack == "shared")
    options = dataclasses.replace(
        OPTIONS, teacher="fixed", trainable=trainable, implementation=implementation
    )
    gradient = jax.jit(train_step.make_gradient(decoder, options))
    state = train_step.init_train_state(trained, KEPT, "fixed")
    loss, grads, _ = gradient(state, params, batch, None, None)
    norm = float(optax.tree.norm(grads))
    if trainable == "lora":
        assert float(loss) == norm == 0
    assert abs(float(loss)) < 1e-6
    assert norm <= BOUND
    # The test can fail: other positions of the teacher's tokens.
    other = batch._replace(
        teacher=batch.teacher._replace(positions_BL=batch.teacher.positions_BL * 2)
    )
    loss, grads, _ = gradient(state, params, other, None, None)
    assert float(loss) > 0
    assert float(optax.tree.norm(grads)) > 1e-4
