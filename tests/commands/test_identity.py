"""A continued run is the same run. Oracles: a file, template or option that was changed; a run that
had the other settings from the start."""

import json
import shutil
import sys

import conftest
import jax
import pytest
import runs

from copsd_jax import main, summary, train
from copsd_jax.config import settings as config_lib
from copsd_jax.metrics import metric_files
from copsd_jax.problems import languages
from copsd_jax.runtime import sharding, workdir
from copsd_jax.training import model_headers, run_facts
from copsd_jax.weights import hub, tokenizer

optax_promotes = runs.optax_promotes

SETTINGS = {"eval__limit": 3, "rollout__max_tokens": 6, "data__limit": 16}


def begin(argv) -> dict:
    """Starts the run without a step; returns its settings."""
    config, directory, _ = main.parse_command(argv)
    plan, _ = train.prepare(config, directory)
    workdir.create(directory, config_lib.flat(config), run_facts.collect_facts(plan))
    return workdir.read_settings(directory)


@pytest.fixture
def refused(capsys):
    def check(argv) -> str:
        capsys.readouterr()
        assert main.main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    return check


def test_tokenizer_template_languages_and_functions(tmp_path, refused, monkeypatch, request):
    folder = shutil.copytree(hub.resolve_model_path("tiny"), tmp_path / "tok")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "my_reward.py").write_text("def f(gold, text):\n    return 1.0\n")
    shutil.copy(languages.BUILT_IN, tmp_path)
    argv = runs.argv(
        "opsd", tmp_path / "w", model__tokenizer=folder, reward__kind="my_reward:f",
        languages_file=tmp_path / "languages.json", **SETTINGS,
    )  # fmt: skip
    request.addfinalizer(lambda: sys.modules.pop("my_reward", None))  # others use this name too
    begin(argv)
    begin(argv)  # the same once more
    settings = folder / "tokenizer_config.json"
    template = tokenizer.load(folder).chat_template
    for file, text, said in (
        (settings, settings.read_text() + "\n", "(tokenizer_config.json was "),
        (folder / "tokenizer.json", (folder / "tokenizer.json").read_text() + " ", "r.json was "),
        (folder / "chat_template.jinja", template, "(chat_template.jinja was absent, now "),
        (folder / "chat_template.jinja", template + "{# #}", "; tokenizer content was "),
        (tmp_path / "my_reward.py", "def f(gold, text):\n    return 2.0\n", "my_reward:f was "),
        (
            tmp_path / "languages.json",
            languages.BUILT_IN.read_text() + "\n",
            "(languages_file was ",
        ),
    ):
        before = file.read_bytes() if file.is_file() else None
        file.write_text(text)
        message = refused(argv)
        assert said in message, message
        file.unlink() if before is None else file.write_bytes(before)
    begin(argv)


def test_options_of_jax(tmp_path, refused):
    argv = runs.argv("opsd", tmp_path / "w", **SETTINGS)
    begin(argv)
    for change, said in (
        (jax.default_prng_impl("rbg"), "(jax_default_prng_impl was threefry2x32, now rbg)"),
        (jax.threefry_partitionable(False), "(jax_threefry_partitionable was True, now False)"),
        (jax.default_matmul_precision("highest"), "precision was absent, now highest)"),
    ):
        with change:
            assert said in refused(argv)
    begin(argv)


def test_the_date_is_that_of_the_first_start(tmp_path, refused, monkeypatch):
    """And it is the date of every prompt, also of programs that read the directory."""
    folder = shutil.copytree(hub.resolve_model_path("tiny"), tmp_path / "tok")
    template = tokenizer.load(folder).chat_template
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + template)
    argv = runs.argv("opsd", tmp_path / "w", model__tokenizer=folder, **SETTINGS)
    monkeypatch.setattr(train.continuation, "choose_date", lambda _: "2026-01-31")
    assert begin(argv)["prompt.date"] == "2026-01-31"
    monkeypatch.setattr(train.continuation, "choose_date", lambda _: "2026-02-01")
    config, directory, _ = main.parse_command(argv)
    plan, known = train.prepare(config, directory)
    assert known
    said = train.loaded_run.prompts.build_student_prompt(plan.tokenizer, plan.student, plan.rows[0])
    assert said.text.startswith("31 Jan 2026")
    saved = train.run_plan.make_plan(workdir.load_run_config(directory))
    assert saved.student.date == "2026-01-31"
    message = refused([*argv, "--config.prompt.date=2026-02-01"])
    assert "prompt.date was '2026-01-31', now '2026-02-01'" in message
    # The date of another config.json, such as that of a new run of the same command.
    other = workdir.read_settings(directory) | {"prompt.date": "2026-02-01"}
    workdir.write_json(directory / "config.json", other)
    assert "(prompt.date was 2026-01-31, now 2026-02-01)" in refused(argv)
    (directory / "config.json").unlink()
    assert begin(argv)["prompt.date"] == "2026-01-31"
    assert "it must be a date such as 2026-01-31" in refused([*argv, "--config.prompt.date=today"])


def test_the_commit_of_a_repository_is_fixed_at_the_first_start(tmp_path, refused, monkeypatch):
    commits = {name: name * 40 for name in "abc"}
    newest = {"main": commits["a"], "dev": commits["c"]}
    for commit in commits.values():
        shutil.copytree(hub.resolve_model_path("tiny"), tmp_path / "snapshots" / commit)
    asked = []

    def download(repo, revision, weights, setting):
        asked.append(revision)
        return tmp_path / "snapshots" / newest.get(revision, revision)

    monkeypatch.setattr(hub, "_download", download)
    argv = runs.argv("opsd", tmp_path / "w", model__path="some/model", **SETTINGS)
    assert begin(argv)["model.commit"] == commits["a"]
    assert set(asked) == {"main"}
    newest["main"] = commits["b"]  # the branch has moved
    asked.clear()
    assert begin(argv)["model.commit"] == commits["a"]
    assert set(asked) == {commits["a"]}
    message = refused([*argv, "--config.model.revision=dev"])
    assert "model.revision was 'main', now 'dev'" in message
    message = refused([*argv, f"--config.model.commit={commits['b']}"])
    assert f"model.commit was '{commits['a']}', now '{commits['b']}'" in message


def test_a_run_without_checkpoints_says_that_it_begins_again(tmp_path, capsys):
    """If the folder was removed, or if no step was saved."""
    argv = runs.argv("opsd", tmp_path, **SETTINGS)
    begin(argv)
    with metric_files.Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 1.0})
    begin(argv)
    said = "metrics.jsonl goes up to step 2, but there is no checkpoint, so step 0 is used"
    assert f"{tmp_path}/{said}" in capsys.readouterr().out.splitlines()
    (tmp_path / "checkpoints" / "1").mkdir()
    begin(argv)
    assert said not in capsys.readouterr().out


def lines(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]


@pytest.mark.slow
def test_more_steps_and_problems(tmp_path, capsys):
    """A constant rate: the run that had all steps and problems from the start, bit for bit."""
    fixed = {"rollout__max_tokens": 6, "train__schedule": "constant", "train__lr": 0.01}
    short, long = tmp_path / "short", tmp_path / "long"
    few, more = {"train__steps": 1, "eval__limit": 2}, {"train__steps": 2, "eval__limit": 4}
    assert main.main(runs.argv("opsd", short, **fixed, **few)) == 0
    capsys.readouterr()
    assert main.main(runs.argv("opsd", short, **fixed, **more)) == 0
    said = capsys.readouterr().out
    assert (
        "train.steps was 1, now 2: the learning rate of step 2 is 0.01 instead of 0.01 (const"
        in said
    )
    assert "step_000000.json lacks 2 of 4 problems, so all are evaluated now" in said
    assert main.main(runs.argv("opsd", long, **fixed, **more)) == 0
    # The short run was also evaluated after its last step.
    found = [line for line in lines(short / "metrics.jsonl") if line["step"] != 1 or "loss" in line]
    assert found == lines(long / "metrics.jsonl")
    for name in ("rollouts/step_000002.jsonl", "eval/step_000000.json", "eval/step_000002.json"):
        assert (short / name).read_bytes() == (long / name).read_bytes()
    # Fewer problems: those that are there are not evaluated again.
    before = (short / "eval/step_000000.json").stat().st_mtime_ns
    assert main.main(runs.argv("opsd", short, **fixed, **more | {"eval__limit": 3})) == 0
    assert (short / "eval/step_000000.json").stat().st_mtime_ns == before


def test_a_run_keeps_the_dtype_of_its_first_start(tmp_path, monkeypatch):
    """As if the run went on on a GPU, where `auto` is bfloat16."""
    argv = runs.argv("opsd", tmp_path / "w", **SETTINGS)
    begin(argv)
    assert workdir.read_settings(tmp_path / "w")["model.dtype"] == "float32"
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    command = main.parse_command(argv)
    plan, known = train.prepare(command.config, command.workdir)
    assert known
    assert plan.dtype == jax.numpy.float32
    assert model_headers.choose_dtype("auto", plan.mesh) == jax.numpy.bfloat16


def test_the_schedule_of_more_steps():
    """Linear over 4 and over 8 steps, from the formula in `make_optimizer`."""
    c = runs.config("opsd", train__steps=8, train__lr=0.1, train__schedule="linear")
    assert summary.summarize_new_schedule(c, 4, 3, 3) == (
        "train.steps was 4, now 8: the learning rate of step 4 is 0.0625 instead of 0.025 and "
        "falls to 0 after step 8 (linear schedule)"
    )
    # One of the three steps was bad, so the optimizer has counted two.
    assert summary.summarize_new_schedule(c, 4, 3, 2) == (
        "train.steps was 4, now 8: the learning rate of step 4 is 0.075 instead of 0.05 and "
        "falls to 0 after 8 updates, of which 2 are done (linear schedule)"
    )


def test_steps_without_update_are_not_counted(tmp_path):
    rows = [{"step": n, "bad": float(n == 2), "no_loss": float(n in (3, 5))} for n in range(1, 7)]
    rows.append({"step": 7})  # as an earlier program wrote it
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [metric_files.count_updates(tmp_path, n) for n in (1, 2, 4, 7)] == [1, 1, 2, 4]
    assert metric_files.count_updates(tmp_path / "none", 3) == 3


@pytest.mark.slow
def test_a_run_of_an_old_program_goes_on(tmp_path, capsys):
    """Commit 1415ef4 saved step 2, was stopped in step 4, and went on by itself to `expected`."""
    data = conftest.ROOT / "tests" / "data" / "old_run"
    expected = json.loads((data / "expected.json").read_text(encoding="utf-8"))
    directory = tmp_path / "w"
    shutil.copytree(data / "w", directory)
    settings = {
        "data__limit": 32, "train__steps": 4, "train__save_every": 2, "train__batch": 16,
        "train__micro_batch": 8, "train__lr": 0.01, "train__keep": 1, "rollout__max_tokens": 6,
        "eval__limit": 2, "lora__rank": 1, "lora__targets": "q", "train__log_rollouts": False,
        "eval__slots": 8,
    }  # fmt: skip
    before = lines(directory / "metrics.jsonl")
    assert [row["step"] for row in before] == [1, 2, 3]
    assert main.main(runs.argv("opsd", directory, **settings)) == 0
    found = lines(directory / "metrics.jsonl")
    trained = [row for row in found if "loss" in row]
    assert trained[:2] == before[:2]
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4, 4]
    for row, wanted in zip(trained[2:], expected["metrics"], strict=True):
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    evaluation = json.loads((directory / "eval/step_000004.json").read_text(encoding="utf-8"))
    for scores in evaluation["scores"].values():
        for name in ("nonfinite", "failed"):  # shares that the old program did not have
            assert scores.pop(name) == 0
    for problem in evaluation["problems"]:
        assert {sample.pop("detail") for sample in problem["samples"]} == {""}
    assert len(evaluation.pop("policy")) == 2  # nor did it have the checksums of the policy
    assert evaluation == expected["evaluation"]
    # The date of its prompts is from then on that of its first start.
    assert workdir.read_settings(directory)["prompt.date"] == "2026-11-29"
