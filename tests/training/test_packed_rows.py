"""Oracle: the same step on the batch of `build_batch`, one completion a row, on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from conftest import mostly_slow
from test_train_step import CONFIG, OPTIONS, make_adapter

from copsd_jax import main
from copsd_jax.dryrun import program_cost
from copsd_jax.model import policy as policy_lib
from copsd_jax.model import shared_prefix, transformer
from copsd_jax.runtime import sharding
from copsd_jax.training import builders, layout, row_packing, run_plan, train_step

CONFIG = dataclasses.replace(CONFIG, vocab_size=96)
OPTIONS = dataclasses.replace(OPTIONS, group=4)
NORMS = ("micro_token_mean", "global_token_mean", "seq_mean", "seq_mean_all")
# The gradient itself, which plain descent would round to the digits of the weights.
KEPT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)
optax_promotes = runs.optax_promotes


@pytest.fixture(scope="module")
def decoder():
    return transformer.Decoder(CONFIG, jnp.float32)


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(CONFIG, jax.random.key(0), jnp.float32)


def samples(seed: int, group: int, B: int = 16):
    """(student prompts, teacher prompts, completions); groups have one prompt on each side."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, 96, rng.integers(low, high)).tolist()  # noqa: E731
    long = np.clip(rng.lognormal(np.log(6), 0.9, B), 1, 40).astype(int)
    ask = [draw(2, 12) for _ in range(B // group)]
    tell = [draw(10, 25) for _ in range(B // group)]
    return (
        [ask[b // group] for b in range(B)],
        [tell[b // group] for b in range(B)],
        [draw(n, n + 1) for n in long],
    )


def arranged(batch, shared=True, **how):
    lengths, sides = layout.measure_prompts(batch, shared)
    plan = row_packing.plan_rows(lengths, sides, **{"shards": 1} | how)
    return layout.pack_rows(batch, plan, shared), plan


def step(decoder, params, batch, shape=None, prefix=None, kv=None, **changes):
    """(gradient, Aux) of a step, on the first device or a mesh."""
    state = train_step.init_train_state(make_adapter(1), KEPT, "fixed")
    if shape is None:
        new, aux = _jit_step(decoder, **changes)(state, params, batch, prefix, kv)
        return new.optimizer, aux
    devices = sharding.make_mesh(*shape)
    jitted = jax.jit(
        train_step.make_step(decoder, KEPT, dataclasses.replace(OPTIONS, **changes)),
        out_shardings=(sharding.shardings(state, devices, CONFIG.n_kv_heads), None),
    )
    with jax.set_mesh(devices):
        placed = (
            sharding.shard_by_name(state, devices, CONFIG.n_kv_heads),
            sharding.shard_by_name(params, devices, CONFIG.n_kv_heads),
        )
        new, aux = jitted(*placed, layout.place_batch(batch, devices), prefix, kv)
    return new.optimizer, aux


@functools.cache
def _jit_step(decoder, **changes):
    return jax.jit(train_step.make_step(decoder, KEPT, dataclasses.replace(OPTIONS, **changes)))


def assert_same(got, want):
    """Loss, each leaf's gradient and every value of every token, where it was sampled."""
    (grads, aux), (known, right) = got, want
    for name, value in right.metrics.items():
        np.testing.assert_allclose(aux.metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    assert float(right.metrics["grad_norm"]) > 1e-3
    for ours, theirs in zip(*map(jax.tree.leaves, (grads, known)), strict=True):
        theirs = np.asarray(theirs)
        assert np.linalg.norm(np.asarray(ours) - theirs) <= 1e-5 * np.linalg.norm(theirs)
    stats = jax.tree.leaves((aux.tokens, aux.policy)), jax.tree.leaves((right.tokens, right.policy))
    for ours, theirs in zip(*stats, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def with_policy(batch):
    rng = np.random.default_rng(3)
    mask_BC = batch.mask_BC & (rng.random((len(batch.mask_BC), 1)) < 0.8)
    return batch._replace(
        loss_BC=batch.mask_BC & (rng.random(batch.mask_BC.shape) < 0.7),
        policy_BC=mask_BC,
        advantage_BC=(rng.normal(size=(len(mask_BC), 1)) * batch.mask_BC).astype(np.float32),
        logp_rollout_BC=np.where(batch.mask_BC, -4.5, 0).astype(np.float32),
    )


@pytest.mark.long
@pytest.mark.parametrize("norm", mostly_slow(NORMS))
def test_groups_with_their_prompts_once_equal_rows_of_their_own(decoder, params, norm):
    batch = layout.build_batch(*samples(1, 8))
    rows, _ = arranged(batch, micros=2)
    assert rows.student.tokens_BL.size < 0.6 * batch.student.tokens_BL.size
    assert_same(step(decoder, params, rows, norm=norm), step(decoder, params, batch, norm=norm))


@pytest.mark.parametrize("shared", mostly_slow([True, False]))
def test_different_prompts(decoder, params, shared):
    batch = layout.build_batch(*samples(2, 1))
    rows, _ = arranged(batch, shared)
    assert (rows.student.parents_BL is None) == (not shared)
    assert_same(step(decoder, params, rows), step(decoder, params, batch))


@pytest.mark.long
def test_worked_examples_in_front(decoder, params):
    batch = layout.build_batch(*samples(3, 8), student_prefix=5, teacher_prefix=3)
    prefix = jnp.asarray([5, 6, 7, 8, 9], jnp.int32)
    kv = shared_prefix.encode_prefix_ids(decoder, policy_lib.Policy(params), [11, 12, 13])
    how = {"prefix": prefix, "kv": (kv,)}
    rows, _ = arranged(batch)
    assert_same(step(decoder, params, rows, **how), step(decoder, params, batch, **how))


@pytest.mark.long
@pytest.mark.parametrize("mixed", [True, False])
def test_policy_loss(decoder, params, mixed):
    """GRPO with the divergence from the initial policy, alone and beside a teacher."""
    settings = train_step.PolicyLoss(
        kind="surrogate", weight=0.7, temperature=0.9, norm="seq_mean_all", length=8,
        clip_low=0.2, clip_high=0.28, kl=0.1, old="sampler",
    )  # fmt: skip
    how = {"policy": settings} if mixed else {"policy": settings, "divergence": None}
    ask, tell, completions = samples(4, 8)
    batch = with_policy(layout.build_batch(ask, tell if mixed else None, completions))
    rows, _ = arranged(batch)
    assert_same(step(decoder, params, rows, **how), step(decoder, params, batch, **how))


@pytest.mark.slow
@pytest.mark.parametrize("shape", mostly_slow([(2, 2, 2), (8, 1, 1)]))
def test_meshes(decoder, params, shape):
    """Bins of 8 and 4 shards, two micro-batches, against one device and rows apart."""
    batch = with_policy(layout.build_batch(*samples(5, 4, 32)))
    shards = shape[0] * shape[1]
    rows, plan = arranged(batch, shards=shards, micros=2)
    assert {*range(2 * shards)} >= {*plan.bin_B}
    assert rows.student.gather_BC.shape[:2] == (2, shards)
    assert_same(step(decoder, params, rows, shape), step(decoder, params, batch))


@pytest.mark.long
def test_micro_batches_by_a_budget_of_tokens(decoder, params):
    batch = layout.build_batch(*samples(6, 2))
    rows, plan = arranged(batch, budget=256)
    assert plan.micros > 2
    assert sum(size.tokens for size in plan.sizes) <= 256
    whole = step(decoder, params, batch, norm="micro_token_mean")
    assert_same(step(decoder, params, rows, norm="micro_token_mean"), whole)


@pytest.mark.slow
def test_no_hidden_state_travels(decoder, params):
    """In no program of a mesh is there a collective of as many states as rows have tokens."""
    batch = layout.build_batch(*samples(5, 1, 32))
    devices, state = (
        sharding.make_mesh(8, 1, 1),
        train_step.init_train_state(make_adapter(1), KEPT, "fixed"),
    )
    for one in (batch, arranged(batch, shards=8)[0]):
        with jax.set_mesh(devices):
            jitted = jax.jit(
                train_step.make_step(decoder, KEPT, OPTIONS),
                out_shardings=(sharding.shardings(state, devices, CONFIG.n_kv_heads), None),
            )
            placed = (
                sharding.shard_by_name(state, devices, CONFIG.n_kv_heads),
                sharding.shard_by_name(params, devices, CONFIG.n_kv_heads),
            )
            lowered = jitted.lower(*placed, layout.place_batch(one, devices), None, None)
        text = lowered.compile().as_text() or ""
        sent = [
            line for line in text.splitlines() if "all-gather(" in line or "all-reduce(" in line
        ]
        assert sent
        tokens = one.student.tokens_BL.size
        others = [
            x for x in program_cost.read_program_text(text, devices)[1] if x.kind != "all-reduce"
        ]
        assert max((x.bytes for x in others), default=0) < tokens * CONFIG.d_model * 4 / 8
        side = layout.place_batch(one, devices).student
        for array in (side.tokens_BL, side.gather_BC):
            assert array.addressable_shards[0].data.size == array.size // 8
        assert not [line for line in sent if f"[{tokens},{CONFIG.d_model}]" in line]


def lines(folder):
    return runs.steps_of(folder)


@pytest.mark.slow
def test_a_run_with_packed_rows_has_the_metrics_of_one_without(tmp_path):
    """Two steps of the tiny card with groups, sampled anew each; and the fill that it reports."""
    made = {}
    settings = {
        "train__steps": 2, "train__batch": 4, "rollout__per_prompt": 4, "eval__path": "",
        "mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2,
    }  # fmt: skip
    for pack in ("off", "shared"):
        argv = runs.argv("opsd", tmp_path / pack, train__pack=pack, **settings)
        assert main.main(argv) == 0
        made[pack] = lines(tmp_path / pack)
    for off, on in zip(made["off"], made["shared"], strict=True):
        assert on.pop("micro_batches") == 1
        for name, value in off.items():
            if name.startswith("fill_"):
                assert 0.5 < on[name] <= 1
            elif not name.startswith("seconds/"):
                assert on[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_budget_for_feedback_holds_the_longest_prompt_that_there_may_be():
    """What a grader will say is not known before; teacher.max_tokens bounds it."""
    settings = {"context__kind": "feedback", "train__pack": "rows", "teacher__max_tokens": 600}
    plan = run_plan.make_plan(runs.config("opsd", **settings, train__micro_tokens=300))
    with pytest.raises(ValueError, match=r"\+ 608 tokens"):  # and a completion of 8
        builders.check_row_budget(plan)
