"""The self-test: faults that are injected one at a time are refused, and a healthy run is not.

Each fault is put where it would arise: into the layout, the hand-over, the plan or the sampler.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from copsd_jax import self_test
from copsd_jax.runtime import failures
from copsd_jax.sampler import loop, program_cache, truncation
from copsd_jax.training import layout, train_step

optax_promotes = runs.optax_promotes
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def opsd():
    with runs.loaded("opsd") as loaded:
        yield loaded


def packed(r):
    """The same run with packed rows."""
    config = copy.deepcopy(r.plan.config)
    config.train.pack = "rows"
    return dataclasses.replace(r, plan=dataclasses.replace(r.plan, config=config))


def refused(r, state, *words):
    with pytest.raises(failures.RefusedRun) as caught:
        self_test.check(r, state)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith("check.self_test=False skips this test)")
    for word in words:
        assert word in text
    return text


def test_a_healthy_run_passes(opsd):
    r, state = opsd
    for run in (r, packed(r)):
        line = self_test.check(run, state)
        assert line.startswith("self-test: sampler and trainer differ by ")


# ---- faults ----------------------------------------------------------------------------------

APART = "and rounding to float32 explains at most"
DIFFERENTLY = "sampler and trainer"


def shift_completions(monkeypatch):
    """The states that predict the completion's tokens are taken one position too late."""
    lay_out = layout._lay_out_side

    def shifted(*args):
        side = lay_out(*args)
        return side._replace(gather_BC=side.gather_BC + 1)

    monkeypatch.setattr(layout, "_lay_out_side", shifted)


def shift_the_teacher(monkeypatch):
    lay_out, calls = layout._lay_out_side, []

    def shifted(*args):
        side = lay_out(*args)
        calls.append(side)
        return side if len(calls) % 2 else side._replace(gather_BC=side.gather_BC + 1)

    monkeypatch.setattr(layout, "_lay_out_side", shifted)


def shift_first_tokens(monkeypatch):
    """Only the first token of each completion is predicted from another position."""
    lay_out = layout._lay_out_side

    def shifted(*args):
        side = lay_out(*args)
        gather_BC = side.gather_BC.copy()
        gather_BC[:, 0] -= 1
        return side._replace(gather_BC=gather_BC)

    monkeypatch.setattr(layout, "_lay_out_side", shifted)


def drop_first_tokens(monkeypatch):
    build = layout.build_batch

    def dropped(students, teachers, completions, **more):
        batch = build(students, teachers, [ids[1:] for ids in completions], **more)
        return batch

    monkeypatch.setattr(layout, "build_batch", dropped)


def swap_the_sides(monkeypatch):
    build = layout.build_batch

    def swapped(students, teachers, completions, **more):
        return build(teachers, students, completions, **more)

    monkeypatch.setattr(layout, "build_batch", swapped)


def leak_between_packed_samples(monkeypatch):
    pack = layout.pack_rows

    def leaking(*args):
        batch = pack(*args)
        join = lambda side: side._replace(  # noqa: E731
            segments_BL=(side.segments_BL > 0).astype(np.int32)
        )
        return batch._replace(student=join(batch.student), teacher=join(batch.teacher))

    monkeypatch.setattr(layout, "pack_rows", leaking)


def leak_between_prefilled_prompts(monkeypatch):
    pack = loop._pack_prompts

    def leaking(*args):
        packed, rest = pack(*args)
        joined = np.minimum(packed.segments_RT, 1)
        return packed._replace(segments_RT=joined), rest

    monkeypatch.setattr(loop, "_pack_prompts", leaking)


def change_rope_of_the_trainer(monkeypatch):
    make = train_step.make_scores

    def changed(decoder, options):
        config = dataclasses.replace(decoder.config, rope_theta=decoder.config.rope_theta / 100)
        return make(decoder.clone(config=config), options)

    monkeypatch.setattr(train_step, "make_scores", changed)


@pytest.mark.parametrize(
    "fault, words",
    [
        (shift_completions, APART),
        (shift_first_tokens, APART),
        (drop_first_tokens, APART),
        (swap_the_sides, APART),
        (leak_between_prefilled_prompts, APART),
        (change_rope_of_the_trainer, APART),
        (shift_the_teacher, "with equal prompts and weights, student and teacher differ"),
    ],
)
def test_a_fault_in_a_layout_is_refused(opsd, monkeypatch, fault, words):
    fault(monkeypatch)
    refused(*opsd, words)


def test_packed_samples_that_see_each_other_are_refused(opsd, monkeypatch):
    leak_between_packed_samples(monkeypatch)
    refused(packed(opsd[0]), opsd[1], APART)


@pytest.mark.parametrize(
    "fault, words",
    [
        (lambda policy: dataclasses.replace(policy, scale=policy.scale / 2), DIFFERENTLY),
        (lambda policy: dataclasses.replace(policy, adapter=None), DIFFERENTLY),
    ],
    ids=["scale halved", "adapter not applied"],
)
def test_a_fault_in_the_hand_over_is_refused(opsd, fault, words):
    r, state = opsd
    refused(
        dataclasses.replace(r, hand_over=lambda policy: r.hand_over(fault(policy))), state, words
    )


def test_an_adapter_that_neither_side_applies_is_refused(opsd, monkeypatch):
    derive = train_step.derive_policies
    bare = lambda *args: tuple(dataclasses.replace(x, adapter=None) for x in derive(*args))  # noqa: E731
    monkeypatch.setattr(train_step, "derive_policies", bare)
    refused(*opsd, "a random adapter changes nothing in the trainer")


def test_a_new_adapter_that_is_not_zero_is_refused(opsd):
    r, state = opsd
    trained = {**state.trained, "q": jax.tree.map(jnp.ones_like, state.trained["q"])}
    refused(r, state._replace(trained=trained), "the new adapter of q is not zero")


@pytest.mark.parametrize("change", [{"thinking": "on"}, {"template": "plain", "thinking": "none"}])
def test_another_template_of_the_teacher_is_refused(opsd, change):
    r, state = opsd
    teacher = r.plan.teacher
    spec = dataclasses.replace(teacher.spec, **change)
    plan = dataclasses.replace(r.plan, teacher=dataclasses.replace(teacher, spec=spec))
    refused(dataclasses.replace(r, plan=plan), state, "but the teacher's follows")


def test_padded_ids_that_may_be_drawn_are_refused(opsd, monkeypatch):
    r, state = opsd
    everything = np.ones_like(r.plan.vocabulary.valid_V)
    assert not r.plan.vocabulary.valid_V.all()
    known = dataclasses.replace(r.plan.vocabulary, valid_V=everything)
    plan = dataclasses.replace(r.plan, vocabulary=known)
    refused(
        dataclasses.replace(r, plan=plan), state, "may draw ids that the tokenizer does not have"
    )


def test_a_sampler_without_its_mask_is_refused(opsd, monkeypatch):
    monkeypatch.setattr(truncation, "_masked", lambda x_JV, _: x_JV)
    monkeypatch.setattr(program_cache, "_PROGRAMS", {})
    jax.clear_caches()
    try:
        refused(*opsd, "draws ids that the tokenizer does not have")
    finally:
        jax.clear_caches()
