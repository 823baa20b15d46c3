"""Bugs of the torch originals that are about a whole run; the others are tested by module."""

import json
import re

import conftest
import jax
import numpy as np
import pytest
import runs

from copsd_jax import evaluation, main
from copsd_jax.config import settings as config_lib
from copsd_jax.methods import distill
from copsd_jax.runtime import checkpoint
from copsd_jax.training import loaded_run

optax_promotes = runs.optax_promotes


def first_rows(r):
    return runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 0)


@pytest.mark.slow
def test_bug_14_the_length_of_an_analysis_is_a_setting():
    lengths = []
    for limit in (3, 9):
        settings = {
            "context__kind": "reason_first",
            "author__kind": "teacher",
            "author__max_tokens": limit,
            "author__temperature": 1.0,
        }
        with runs.loaded("opsd", **settings) as (r, state):
            records = distill.make_batch(r, state, first_rows(r), 0).records
            encode = r.plan.tokenizer.encode
            lengths.append(max(len(encode(record["reply"])) for record in records))
    assert lengths[0] < lengths[1]


@pytest.mark.slow
def test_bug_23_rollout_files_hold_their_own_step_only(tmp_path):
    workdir = tmp_path / "w"
    settings = {"train__batch": 8, "rollout__per_prompt": 2, "eval__path": "", "train__steps": 2}
    assert main.main(runs.argv("opsd", workdir, **settings)) == 0
    for step in (1, 2):
        lines = (workdir / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines()
        assert len(lines) == 16
    with runs.loaded("opsd", **settings) as (r, _):
        order = runs.batch_at(r.plan.rows, ["en"], (), 8, 0, 1)
    ids = [json.loads(line)["id"] for line in lines]
    assert ids == [row.id for row in order for _ in range(2)]


@pytest.mark.slow
def test_bug_24_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    argv = runs.argv("opsd", tmp_path / "w", eval__path="", train__steps=1)
    assert main.main(argv) == 0

    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(distill, "make_batch", never)
    assert main.main(argv) == 0


def test_bug_25_every_setting_is_read_somewhere():
    sources = [
        path.read_text(encoding="utf-8")
        for path in (conftest.ROOT / "copsd_jax").rglob("*.py")
        if path.parent.name != "config"
    ]
    text = "\n".join(sources)

    def picked(section: str) -> set[str]:
        """The words of lists of names in files that `pick` settings of a section by name."""
        files = [s for s in sources if re.search(rf"pick\([\w.]*\b{section}, ", s)]
        return {w for s in files for names in re.findall(r'"([a-z_ ]+)"', s) for w in names.split()}

    # Sections that are also read by a variable: `s = config.sampler`, `config.train[name]`.
    variable = ("train", "rollout", "eval", "prompt", "teacher", "author", "tokens", "sampler")
    unread = []
    for name in config_lib.flat(config_lib.default()):
        section, _, key = name.rpartition(".")
        found = re.search(rf"\b{section}\.{key}\b" if section else rf"\.{key}\b", text)
        found = found or key in picked(section)
        if not found and not (section in variable and re.search(rf"\b{key}\b", text)):
            unread.append(name)
    assert not unread


@pytest.mark.slow
def test_bug_28_an_evaluation_is_of_the_adapter_it_is_asked_for():
    with runs.loaded("opsd", eval__limit=6) as (r, state):
        moved = state._replace(trained=jax.tree.map(lambda x: x + 0.3, state.trained))
        texts = []
        for s in (state, moved):
            result = evaluation.evaluate(
                r, loaded_run.derive_run_policies(r, s)[0], r.plan.eval_rows
            )
            texts.append([p["samples"][0]["text"] for p in result["problems"]])
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_bug_31_saved_adapters_are_not_empty(tmp_path):
    workdir = tmp_path / "w"
    settings = {"eval__path": "", "train__steps": 1, "train__lr": 0.01}
    assert main.main(runs.argv("opsd", workdir, **settings)) == 0
    with (
        runs.loaded("opsd", **settings) as (r, like),
        checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints,
    ):
        trained = checkpoints.load(1, like).trained
    assert set(trained) == set(r.plan.config.lora.targets)
    for leaves in trained.values():
        assert float(np.abs(leaves["b"]).max()) > 1e-4  # zero before the step


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["fixed", "ema", "live"])
def test_full_fine_tuning_runs_and_leaves_the_frozen_copy(teacher):
    """Two steps: the first one's donated buffers must not be anybody else's."""
    settings = {"train__trainable": "full", "teacher__weights": teacher}
    with runs.loaded("opsd", **settings) as (r, state):
        frozen = jax.device_get(r.frozen)
        assert bool(frozen) == (teacher == "fixed")
        for step in range(2):
            work = distill.make_batch(r, state, first_rows(r), step)
            state, aux = r.step(state, r.frozen, work.batch, work.student_prefix, work.teacher_kv)
            assert np.isfinite(float(aux.metrics["loss"]))
        jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(r.frozen))
        assert int(state.step) == 2


@pytest.mark.slow
def test_no_steps_and_evaluations_in_between(tmp_path):
    argv = runs.argv("opsd", tmp_path / "a", train__steps=0, eval__limit=2)
    assert main.main(argv) == 0
    assert [p.name for p in (tmp_path / "a" / "eval").iterdir()] == ["step_000000.json"]
    argv = runs.argv("opsd", tmp_path / "b", train__steps=2, eval__every=1, eval__limit=2)
    assert main.main(argv) == 0
    names = sorted(p.name for p in (tmp_path / "b" / "eval").iterdir())
    assert names == ["step_000000.json", "step_000001.json", "step_000002.json"]


@pytest.mark.slow
def test_a_mesh_with_all_axes_gives_the_run_of_one_axis(tmp_path):
    """Prompts sampled and numbers measured do not depend on the mesh."""
    lines = []
    for name, shape in (("a", (8, 1, 1)), ("b", (2, 2, 2))):
        sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), shape, strict=True))
        argv = runs.argv("opsd", tmp_path / name, eval__path="", train__steps=2, **sizes)
        assert main.main(argv) == 0
        rows = (tmp_path / name / "rollouts/step_000002.jsonl").read_text().splitlines()
        metrics = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        lines.append(([json.loads(r)["completion_ids"] for r in rows], json.loads(metrics[-1])))
    assert lines[0][0] == lines[1][0]
    np.testing.assert_allclose(lines[0][1]["loss"], lines[1][1]["loss"], rtol=1e-3)
