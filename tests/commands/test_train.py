"""Oracles: an unbroken run for a broken one; recomputation of what the files say."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from copsd_jax import evaluation, main, train
from copsd_jax.methods import distill
from copsd_jax.metrics import eval_tables, metric_files
from copsd_jax.model import transformer
from copsd_jax.runtime import checkpoint, failures
from copsd_jax.teaching import contexts, replies
from copsd_jax.training import guards, loaded_run, rollout_records

optax_promotes = runs.optax_promotes

SETTINGS = {"train__steps": 4, "train__save_every": 2, "eval__limit": 3, "rollout__max_tokens": 6}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers(workdir):
    """metrics.jsonl without wall times."""
    rows = read_lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    assert main.main(runs.argv("copsd", workdir, **SETTINGS)) == 0
    return workdir


def test_a_run_leaves_everything_in_its_directory(whole):
    names = {str(p.relative_to(whole)) for p in whole.rglob("*")}
    for name in (
        "config.json", "run.json", "metrics.jsonl", "eval/step_000000.json",
        "eval/step_000004.json", *(f"rollouts/step_{k:06d}.jsonl" for k in (1, 2, 3, 4)),
    ):  # fmt: skip
        assert name in names
    assert any(name.startswith("tensorboard/") for name in names)
    assert [row["step"] for row in numbers(whole)] == [0, 1, 2, 3, 4, 4]
    assert "commit" in json.loads((whole / "run.json").read_text())["starts"][0]


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(whole, tmp_path, monkeypatch):
    """4 steps = 3 and a kill, then the same command again: numbers, texts and weights."""
    make_batch = distill.make_batch

    def killed(r, state, rows, step):
        if step == 3:
            raise KeyboardInterrupt
        return make_batch(r, state, rows, step)

    workdir = tmp_path / "w"
    argv = runs.argv("copsd", workdir, **SETTINGS)
    monkeypatch.setattr(distill, "make_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        main.main(argv)
    assert [row["step"] for row in numbers(workdir)] == [0, 1, 2, 3]  # 3 is after the checkpoint
    monkeypatch.setattr(distill, "make_batch", make_batch)
    assert main.main(argv) == 0
    assert numbers(workdir) == numbers(whole)
    for k in (1, 2, 3, 4):
        name = f"rollouts/step_{k:06d}.jsonl"
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    assert (workdir / "eval/step_000004.json").read_bytes() == (
        whole / "eval/step_000004.json"
    ).read_bytes()
    with runs.loaded("copsd", **SETTINGS) as (_, like):
        states = []
        for directory in (workdir, whole):
            with checkpoint.Checkpoints(directory / "checkpoints") as checkpoints:
                assert checkpoints.steps() == [2, 4]
                states.append(checkpoints.load(4, like))
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert len(json.loads((workdir / "run.json").read_text())["starts"]) == 2
    # A finished run is left as it is, and another config is refused.
    before = (workdir / "metrics.jsonl").read_bytes()
    assert main.main(argv) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert main.main([*argv, "--config.train.lr=0.5"]) == 2


def test_rollout_files_hold_what_was_trained_on(whole):
    """Log-probabilities of a record, recomputed from its ids with the plain model."""
    with runs.loaded("copsd", **SETTINGS) as (r, state):
        rows = read_lines(whole / "rollouts/step_000001.jsonl")
        assert {row["lang"] for row in rows} == {"sw", "fr"}
        student, teacher = loaded_run.derive_run_policies(r, state)

        @jax.jit
        def forward(policy, ids):
            positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
            stream = transformer.Stream(
                ids, positions, jnp.ones_like(ids), policy.adapter, r.plan.adapter_scale
            )
            hidden = r.decoder.apply({"params": policy.params}, (stream,))[0].hidden_BLD
            return jax.nn.log_softmax(
                transformer.compute_model_logits(hidden, transformer.get_head(policy.params))
            )[0]

        alone = lambda *args: np.asarray(forward(*args))  # noqa: E731
        for row in rows[:2]:
            for side, policy in (("student", student), ("teacher", teacher)):
                prompt, completion = row[f"{side}_prompt_ids"], row["completion_ids"]
                assert r.plan.tokenizer.decode(prompt) == row[f"{side}_prompt"]
                logp = alone(policy, np.asarray([prompt + completion], np.int32))
                expected = [logp[len(prompt) - 1 + t, token] for t, token in enumerate(completion)]
                np.testing.assert_allclose(row[f"logp_{side}"], expected, atol=1e-4)
            np.testing.assert_allclose(row["logp_sampler"], row["logp_student"], atol=1e-4)


def test_sampler_and_trainer_agree(whole):
    for row in runs.steps_of(whole):
        assert row["logp_gap_max"] < 1e-4
        assert row["tokens"] == sum(
            len(record["completion_ids"])
            for record in read_lines(whole / f"rollouts/step_{row['step']:06d}.jsonl")
        )


@pytest.mark.slow
def test_agreement_is_measured_at_the_sampling_temperature():
    """Other temperatures for sampling and loss: the gap is still that of two programs."""
    with runs.loaded(
        "opsd", rollout__temperature=0.7, loss__temperature=1.6, rollout__top_k=20
    ) as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)
        work = distill.make_batch(r, state, rows, 0)
        _, aux = r.step(state, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
        gaps = rollout_records.add_rollout_token_values(r, work, jax.device_get(aux))
        assert gaps["logp_gap_max"] < 1e-4
        record = work.records[0]
        assert np.abs(np.subtract(record["logp_sampler"], record["logp_student"])).max() > 1e-2
        assert min(np.subtract(record["logp_sampler_truncated"], record["logp_sampler"])) >= 0


@pytest.mark.slow
def test_context_none_gives_no_loss():
    """Student and teacher prompts are equal, b is 0: below 1e-6 through sampler and model."""
    with runs.loaded("opsd", context__kind="none") as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)
        work = distill.make_batch(r, state, rows, 0)
        for record in work.records:
            assert record["student_prompt_ids"] == record["teacher_prompt_ids"]
        _, aux = r.step(state, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
        assert abs(float(aux.metrics["loss"])) < 1e-6
        assert float(aux.metrics["grad_norm"]) < 1e-6


@pytest.mark.slow
def test_bug_15_and_16_the_teacher_itself_writes_the_analysis():
    """With an adapter that changes the student, the fixed teacher's analysis stays as it was; it
    stands in a turn of its own before a new user turn."""
    with runs.loaded(
        "opsd",
        context__kind="reason_first",
        author__kind="teacher",
        author__max_tokens=5,
        author__temperature=1.0,
    ) as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)
        first = distill.make_batch(r, state, rows, 0)
        moved = state._replace(trained=jax.tree.map(lambda x: x + 0.5, state.trained))
        second = distill.make_batch(r, moved, rows, 0)
        assert [a["reply"] for a in first.records] == [b["reply"] for b in second.records]
        assert [a["completion"] for a in first.records] != [b["completion"] for b in second.records]
        for record in first.records:
            turns = record["teacher_prompt"].split("<|im_start|>")[1:]
            assert [turn.split("\n")[0] for turn in turns] == [
                "user", "assistant", "user", "assistant",
            ]  # fmt: skip


def test_a_row_that_occurs_twice_in_a_step_is_sampled_anew():
    with runs.loaded("opsd", rollout__per_prompt=2, train__batch=4) as (r, state):
        row = r.plan.rows[0]
        work = distill.make_batch(r, state, [row, row], 0)
        assert [record["sample"] for record in work.records] == [0, 1, 2, 3]
        assert len({record["completion"] for record in work.records}) == 4


@pytest.mark.slow
def test_overlong_teacher_prompts_carry_no_loss_and_are_counted():
    with runs.loaded(
        "opsd",
        context__kind="reason_first",
        author__kind="teacher",
        author__max_tokens=64,
        author__temperature=1.0,
        teacher__max_tokens=250,
    ) as (r, state):
        rows = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)
        work = distill.make_batch(r, state, rows, 0)
        told = [
            r.plan.teacher.build(contexts.Attempt(row), replies.read_analysis(record["reply"]))
            for row, record in zip(rows, work.records, strict=True)
        ]
        long = [prompt.length > 250 for prompt in told]
        assert any(long)
        assert work.metrics["overlong_teacher_prompts"] == sum(long)
        assert (work.batch.loss_BC.any(axis=1) != np.asarray(long)).all()


@pytest.mark.slow
def test_evaluation_groups_and_comparison():
    """Scores by hand from the samples that the evaluation returns."""
    with runs.loaded("copsd", eval__limit=4, eval__samples=2, eval__temperature=1.0) as (r, state):
        result = evaluation.evaluate(
            r, loaded_run.derive_run_policies(r, state)[0], r.plan.eval_rows
        )
        again = evaluation.evaluate(
            r, loaded_run.derive_run_policies(r, state)[0], r.plan.eval_rows
        )
    assert result == again
    assert set(result["scores"]) >= {"sw", "fr"}
    for lang in ("sw", "fr"):
        mine = [p for p in result["problems"] if p["lang"] == lang]
        correct = [s["correct"] for p in mine for s in p["samples"]]
        assert result["scores"][lang]["avg_at_n"] == np.mean(correct)
        assert result["scores"][lang]["truncated"] == np.mean(
            [s["truncated"] for p in mine for s in p["samples"]]
        )
    better = json.loads(json.dumps(result))
    for problem in better["problems"]:
        for sample in problem["samples"]:
            sample["correct"] = True
    better["scores"] = {k: {**v, "avg_at_n": 1.0} for k, v in result["scores"].items()}
    table = eval_tables.format_eval_comparison(result, better)
    assert "+100.0" in table


def test_evaluations_are_compared_on_the_problems_that_both_have(whole, tmp_path):
    """Oracle: the comparison of the parts that are the same problems."""
    path = whole / "eval/step_000000.json"
    before = json.loads(path.read_text())
    after = json.loads(json.dumps(before))
    for problem in after["problems"]:
        problem["samples"][0]["correct"] = True
    rows = after["problems"]
    same = {"problems": [row for row in before["problems"] if row["id"] != rows[-1]["id"]]}
    changed = [*rows[:-1], rows[-1] | {"problem": "another text"}, rows[-1] | {"id": "another"}]
    table = eval_tables.format_eval_comparison(before, after | {"problems": changed[::-1]})
    assert table == eval_tables.format_eval_comparison(same, after)
    assert table != eval_tables.format_eval_comparison(before, after)


def test_an_evaluation_that_lacks_problems_is_not_reused(whole, capsys):
    path = whole / "eval/step_000000.json"
    with runs.loaded("copsd", **SETTINGS) as (r, _):
        rows = r.plan.eval_rows
    assert evaluation.read_evaluation(path, rows) == json.loads(path.read_text())
    assert evaluation.read_evaluation(path, rows[:1]) is not None
    assert capsys.readouterr().out == ""
    more = [*rows, dataclasses.replace(rows[0], id="another")]
    assert evaluation.read_evaluation(path, more) is None
    assert f"lacks 1 of {len(more)} problems, so all are evaluated now" in capsys.readouterr().out
    assert evaluation.read_evaluation(path.with_name("step_000009.json"), rows) is None


def guarded(directory, lines, events):
    """The guards' state after step 3 of a run with these lines of metrics, and its events."""
    rules = guards.parse_rules(["loss>1@2:lr*0.5", "loss>1:warn"])
    for name, rows in (("metrics", lines), ("events", events)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    written = metric_files.read_metric_lines(directory, 3)
    return train._restore_guards(types.SimpleNamespace(guards=rules), directory, 3, written)


def test_an_action_that_the_metrics_do_not_give_again_is_refused(tmp_path):
    lines = [{"step": step, "loss": 2} for step in (1, 2, 3, 4)]
    warned, acted = (
        {"step": step, "action": action, "text": f"step {step}: said"}
        for step, action in ((1, "warn"), (2, "lr"))
    )
    for events in ([warned, acted], [acted], []):
        guard, said = guarded(tmp_path, lines, events)
        assert guard["factor"] == 0.5
        assert [(e["step"], e["action"]) for e in said] == [(1, "warn"), (2, "lr")]
        assert read_lines(tmp_path / "events.jsonl") == said
    del lines[0]  # the rule would now act in step 3
    for events in ([acted], [warned, acted]):
        with pytest.raises(failures.UnusableFile) as refused:
            guarded(tmp_path, lines, events)
        assert str(refused.value) == (
            f"{tmp_path}/events.jsonl has an action that does not follow from metrics.jsonl (step "
            "2: said): restore the lines of metrics.jsonl from a copy or, to continue without this "
            "action, remove its line from events.jsonl"
        )
        assert read_lines(tmp_path / "events.jsonl") == events
    assert guarded(tmp_path, lines, [warned])[0]["factor"] == 0.5


def test_events_after_the_checkpoint_are_dropped(tmp_path):
    """Otherwise a later start would find an action that the metrics do not have."""
    late = {"step": 4, "action": "lr", "text": "of another schedule"}
    assert guarded(tmp_path, [{"step": 4, "loss": 2}], [late])[1] == []
    assert read_lines(tmp_path / "events.jsonl") == []


@pytest.mark.slow
def test_no_file_of_another_schedule_is_left(tmp_path, capsys):
    """Oracle: the same continuation of a directory without the files of step 3."""
    settings = {
        "train__save_every": 2, "eval__every": 1, "eval__limit": 2, "train__batch": 8,
        "rollout__max_tokens": 6, "train__lr": 0.1, "train__schedule": "linear",
    }  # fmt: skip
    left, clean = tmp_path / "left", tmp_path / "clean"
    assert main.main(runs.argv("opsd", left, **settings, train__steps=3)) == 0
    shutil.rmtree(left / "checkpoints/3")
    shutil.copytree(left, clean)
    (clean / "eval/step_000003.json").unlink()
    (clean / "rollouts/step_000003.jsonl").unlink()
    settings |= {"train__steps": 4, "train__log_rollouts": False}
    capsys.readouterr()
    for directory in (left, clean):
        assert main.main(runs.argv("opsd", directory, **settings)) == 0
        said = capsys.readouterr().out
        assert ("step_000003.json is the result of another policy" in said) == (directory == left)
        assert "step_000002.json is the result of another policy" not in said
    for name in ("eval", "rollouts"):
        first, second = (
            {p.name: p.read_bytes() for p in (d / name).iterdir()} for d in (left, clean)
        )
        assert first == second
    assert len(list(left.glob("eval/*"))) == 5
