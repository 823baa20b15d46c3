"""A completion whose logits were not finite. Oracle: the step without that completion."""

import json
import math

import jax
import numpy as np
import pytest
import runs
from test_methods import completion, one_device, right, row_with, script, spoiled
from test_records import moved

from copsd_jax import evaluation, train
from copsd_jax.methods import distill, table
from copsd_jax.metrics import terminal
from copsd_jax.runtime import bad_steps, failures, nonfinite, workdir
from copsd_jax.sampler import loop
from copsd_jax.teaching import token_selection
from copsd_jax.training import loaded_run, rollout_records

optax_promotes = runs.optax_promotes
one_device = one_device


def lose(monkeypatch, *places):
    """Lets call k of `loaded_run.sample` lose the completion at the k-th place."""
    sample, waiting = loaded_run.sample, list(places)

    def losing(*args, **options):
        result, at = sample(*args, **options), waiting.pop(0)
        completions = list(result.completions)
        if at is not None:
            completions[at] = loop.drop_tokens()
        return result._replace(completions=completions)

    monkeypatch.setattr(loaded_run, "sample", losing)


def stepped(r, state, row):
    work = table.METHODS[r.plan.config.method].make_batch(r, state, [row], 0)
    _, aux = r.step(state, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
    aux = jax.device_get(aux)
    return work, {
        **aux.metrics,
        **work.metrics,
        **rollout_records.add_rollout_token_values(r, work, aux),
    }


SETTINGS = {
    "policy__weight": 0.5, "train__batch": 1, "context__feedback": "never", "eval__path": "",
    "policy__norm": "token",
}  # fmt: skip


@pytest.mark.slow
def test_a_lost_completion_counts_in_no_group(monkeypatch):
    """Its place is first in the group, where the sibling is taken from."""
    with runs.loaded("sdpo", rollout__per_prompt=4, **SETTINGS) as (r, state):
        row, state = row_with(r, 2), moved(state, 0.3)
        wrong, _ = spoiled(row)
        texts = [right(row), wrong, right(row), wrong]
        script(monkeypatch, texts)
        lose(monkeypatch, 0)
        work, values = stepped(r, jax.tree.map(jax.numpy.copy, state), row)
    with runs.loaded("sdpo", rollout__per_prompt=3, **SETTINGS) as (r, _):
        script(monkeypatch, texts[1:])
        known, metrics = stepped(r, state, row)
    lost, *others = work.records
    assert (lost["finish"], lost["completion"], lost["completion_ids"]) == ("nonfinite", "", [])
    assert (lost["correct"], lost["grade_status"], lost["taught"]) == (None, "nonfinite", False)
    assert lost["reply_status"] == "filtered"
    assert not work.batch.loss_BC[0].any()
    assert not work.batch.policy_BC[0].any()
    for record, other in zip(others, known.records, strict=True):
        for name in ("teacher_prompt", "correct", "reward", "advantage", "sibling", "taught"):
            assert record[name] == other[name], name
        np.testing.assert_allclose(record["policy_loss"], other["policy_loss"], atol=1e-5)
    assert others[1]["advantage"] > 0
    assert values["rollout_nonfinite"] == 1
    assert "rollout_nonfinite" not in metrics
    assert "logp_absent" not in values
    assert values["graded"] == metrics["graded"] == 3
    assert values["taught"] == metrics["taught"]
    for name in ("loss", "divergence", "policy_loss", "grad_norm"):
        np.testing.assert_allclose(values[name], metrics[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_lost_reply_is_unusable_and_counted(monkeypatch):
    settings = {"author__kind": "student", "rollout__per_prompt": 2, "train__batch": 1}
    with runs.loaded("rosd", **settings) as (r, state):
        row = row_with(r, 2)
        script(monkeypatch, [right(row), spoiled(row)[0]], ["no", "no"])
        lose(monkeypatch, None, 1)
        work, _ = stepped(r, state, row)
    assert work.metrics["reply_nonfinite"] == 1
    assert [record["reply_status"] for record in work.records][1] == "nonfinite"
    assert work.records[1]["reply"] == ""
    assert not work.batch.loss_BC[1].any()


def test_a_lost_sample_of_an_evaluation_is_counted_and_not_correct(monkeypatch):
    """Also where the reward of no text would be a success."""
    settings = {"eval__limit": 4, "reward__kind": "runs:by_text", "reward__threshold": 0.0}
    with runs.loaded("opsd", **settings) as (r, state):
        rows = r.plan.eval_rows
        assert len(rows) == 4

        def sample(r, policy, asked, section, keys, progress, done):
            made = [completion(r, f"\\boxed{{{i}}}") for i in range(len(asked))]
            made[2] = loop.drop_tokens()
            for i, one in enumerate(made):
                done(i, one)
            return runs.sampled(made)

        monkeypatch.setattr(loaded_run, "sample", sample)
        policy = loaded_run.derive_run_policies(r, state)[0]
        result = evaluation.evaluate(r, policy, rows)
    samples = [problem["samples"][0] for problem in result["problems"]]
    assert [one["correct"] for one in samples] == [True, True, False, True]
    assert [one["status"] for one in samples] == ["computed", "computed", "nonfinite", "computed"]
    assert (samples[2]["text"], samples[2]["tokens"], samples[2]["answer"]) == ("", 0, None)
    assert result["scores"]["en"]["nonfinite"] == 0.25
    assert result["scores"]["en"]["avg_at_n"] == 0.75


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_a_step_without_most_logits_is_bad(monkeypatch, tmp_path, count):
    """Half of the completions may be lost; without more, the weights stay as they were."""
    with runs.loaded("opsd", train__batch=4, eval__path="") as (r, state):
        row = row_with(r, 1)
        script(monkeypatch, [*"abcd"])
        sample = loaded_run.sample

        def losing(*args, **options):
            result = sample(*args, **options)
            kept = result.completions[count:]
            return result._replace(completions=[loop.drop_tokens()] * count + kept)

        monkeypatch.setattr(loaded_run, "sample", losing)
        before = jax.device_get(state.trained)
        bad = bad_steps.BadSteps(tmp_path, 0)
        timer, late = terminal.Timer(), (math.inf, 0.0)
        state, _, values = train._run_training_step(
            r, state, [row] * 4, 0, np.float32(1), timer, bad, late
        )
    assert values["rollout_nonfinite"] == count
    assert values["bad"] == (count == 3)
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), before, jax.device_get(state.trained)
    )
    assert any(jax.tree.leaves(moved)) == (count == 2)
    said = "step 1: the logits of more than half of the completions are not finite, so the weights"
    assert [line.startswith(said) for line in bad.describe(1)] == [True] * (count == 3)


def reward(gold, text):
    """A reward for reward.kind of this module: a text with a line break raises."""
    if "\n" in text:
        raise KeyError(text)
    return 1.0 if text == "fine" else "good"


def test_an_evaluation_that_lost_most_samples_has_no_result(monkeypatch, tmp_path, capsys):
    """Half of the samples may be lost, of whatever kind, and count as wrong."""
    kind = {"reward__kind": "test_nonfinite_rollouts:reward", "reward__threshold": 0.0}
    lost = {"nonfinite": loop.drop_tokens(), "failed": loop.drop_tokens("failed", "HTTP 500")}
    made = []
    with runs.loaded("opsd", eval__limit=4, **kind) as (r, state):

        def evaluated(*texts):
            made[:] = [lost[text] if text in lost else completion(r, text) for text in texts]
            return evaluation.evaluate_step(r, state, 3, tmp_path / "step_000003.json", "here:")

        def sample(r, policy, asked, section, keys, progress, done):
            for i, one in enumerate(made):
                done(i, one)
            return runs.sampled(made)

        monkeypatch.setattr(loaded_run, "sample", sample)
        monkeypatch.setattr(workdir, "partial_file", lambda _: None)
        monkeypatch.setattr(evaluation.storage, "remove", lambda _: None)
        result = evaluated("fine", "a\nb", "odd", "fine")
        both = [x["samples"][0] for x in result["problems"]]
        assert [x["correct"] for x in both] == [True, False, False, True]
        assert [x["status"] for x in both][1:3] == ["raised:KeyError", "no_number"]
        returned = "it returned 'good' (str) instead of a finite number or (number, text)"
        assert [x["detail"] for x in both] == ["", r"KeyError: 'a\nb'", returned, ""]
        reason = "got no reward from the function of reward.kind, the first:"
        assert capsys.readouterr().out.endswith(
            f"here: 2 of 4 samples {reason} KeyError: 'a\\nb'\n"
        )
        whole = "4 samples of an evaluation"
        advice = "correct the function, and begin the run in another --workdir"
        for texts, error, said in (
            (("odd", "a\nb", "odd", "fine"), failures.RefusedRun,
             f"3 of {whole} {reason} {returned}; {advice}"),
            (("nonfinite", "odd", "nonfinite", "fine"), nonfinite.NonFinite,
             f"2 of {whole} have logits that are not finite; 1 of {whole} {reason} {returned}"),
            (("failed", "failed", "odd", "fine"), failures.EngineError,
             f"2 of {whole} failed, the first: HTTP 500; 1 of {whole} {reason} {returned}"),
        ):  # fmt: skip
            with pytest.raises(error) as refused:
                evaluated(*texts)
            assert str(refused.value) == said
    assert json.loads((tmp_path / "step_000003.json").read_text()) == result


def test_a_told_completion_without_a_token_of_loss_is_not_taught(monkeypatch):
    """No token of the first is selected, although it has a teacher prompt."""
    select = token_selection.select_tokens

    def first_without(settings, decoded, start, n, view, reply):
        mask, status = select(settings, decoded, start, n, view, reply)
        return mask & (decoded.text != "one"), status

    monkeypatch.setattr(token_selection, "select_tokens", first_without)
    with runs.loaded("opsd", train__batch=2, eval__path="") as (r, state):
        script(monkeypatch, ["one", "two"])
        row = row_with(r, 1)
        work = distill.make_batch(r, state, [row, row], 0)
    assert [record["teacher_prompt"] is not None for record in work.records] == [True, True]
    assert work.batch.loss_BC.any(axis=1).tolist() == [False, True]
    assert work.metrics["taught"] == 1
