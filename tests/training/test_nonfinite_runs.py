"""Whole runs in which a number becomes NaN. Oracle: the same run without it, file by file."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import safetensors.numpy
import spoiled_run

from copsd_jax import evaluate, export, main, replay
from copsd_jax.model import transformer
from copsd_jax.runtime import checkpoint, nonfinite
from copsd_jax.sampler import program_cache
from copsd_jax.training import train_step
from copsd_jax.weights import hf, hub, tokenizer

optax_promotes = runs.optax_promotes
pytestmark = pytest.mark.slow

# Two completions of the tiny model hardly ever have different rewards, unless the text decides.
SETTINGS = {
    "train__steps": 7, "train__save_every": 1, "train__keep": 0, "eval__limit": 2,
    "train__batch": 8, "reward__kind": "spoiled_run:by_text",
}  # fmt: skip


def run(workdir, **settings) -> int:
    return main.main(runs.argv("grpo", workdir, **SETTINGS | settings))


def lines(workdir) -> list[dict]:
    values = runs.steps_of(workdir)
    return [{k: v for k, v in one.items() if not k.startswith("seconds/")} for one in values]


def states(workdir, **settings) -> dict[int, train_step.State]:
    with (
        runs.loaded("grpo", **SETTINGS | settings) as (_, like),
        checkpoint.Checkpoints(workdir / "checkpoints") as saved,
    ):
        return {step: jax.device_get(saved.load(step, like)) for step in saved.steps()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    assert run(workdir) == 0
    return workdir


@pytest.fixture
def spoiled(monkeypatch):
    """Spoils a run; the programs of other runs are not used, nor used by others."""

    def spoil(kind, *steps):
        program_cache._PROGRAMS.clear()
        jax.clear_caches()
        spoiled_run.spoil(kind, set(steps), monkeypatch.setattr)

    yield spoil
    program_cache._PROGRAMS.clear()
    jax.clear_caches()


def test_bad_steps_leave_the_weights_and_are_reproduced(whole, spoiled, tmp_path, capsys):
    workdir = tmp_path / "w"
    spoiled("input", 3, 4)
    assert run(workdir) == 0
    out = capsys.readouterr().out
    assert "step 3 is not saved, because it was bad" in out
    assert "step 4 is not saved, because the last 2 steps were bad" in out
    found, known = lines(workdir), lines(whole)
    assert [line["bad"] for line in found] == [0, 0, 1, 1, 0, 0, 0]
    assert found[:2] == known[:2]
    assert found[2]["loss"] == "nan"
    rates = [line["learning_rate"] for line in found]
    assert rates[2] == rates[3] == rates[4] == known[2]["learning_rate"]
    assert rates[5:] == [line["learning_rate"] for line in known[3:5]]
    saved = states(workdir)
    assert sorted(saved) == [1, 2, 5, 6, 7]
    for state in saved.values():
        assert bool(nonfinite.is_finite(state))
    for record in (workdir / "rollouts/step_000003.jsonl").read_text().splitlines():
        json.loads(record, parse_constant=pytest.fail)
    # The command of the message, in a process of its own and without what spoiled the run.
    command = re.search(r"python -m (copsd_jax\.replay --workdir=\S+ --step=4)", out)
    done = subprocess.run(
        [sys.executable, "-m", *command[1].split()], capture_output=True, text=True,
        cwd=conftest.ROOT, env=environment(8),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss: nan, in the run nan" in done.stdout
    assert "not finite in the state: none" in done.stdout
    assert "not finite in the inputs: batch/advantage_BC\n" in done.stdout
    assert re.search(r"not finite in the gradient: .*q/b \([\d,]+ of [\d,]+ in la", done.stdout)
    assert "not finite in completions: completion 1 (tokens [0])" in done.stdout
    assert replay.main(["replay", f"--workdir={workdir}", "--step=5"]) == 2
    assert "step_000005.npz does not exist; the bad steps are [3, 4]" in capsys.readouterr().err


def test_a_finite_step_is_reproduced_bit_for_bit(spoiled, tmp_path, monkeypatch, capsys):
    """The loss is finite, but the gradient is not; a changed state gives another loss."""
    from test_nonfinite_step import spoiled as in_gradient

    workdir = tmp_path / "w"
    settings = {"train__steps": 2, "eval__path": "", "lora__targets": "q,v"}
    build = in_gradient(train_step._build_micro_batch_loss)
    monkeypatch.setattr(train_step, "_build_micro_batch_loss", build)
    for pack in ("off", "shared"):
        shutil.rmtree(workdir, ignore_errors=True)
        assert run(workdir, **settings, train__pack=pack) == 0
        assert [line["bad"] for line in lines(workdir)] == [1, 1]
        capsys.readouterr()
        assert replay.main(["replay", f"--workdir={workdir}", "--step=2"]) == 0
        out = capsys.readouterr().out
        assert "not finite in the gradient: q/a (1 of " in out
        assert "in layers [0])" in out
        loss = re.search(r"loss: (\S+), in the run (\S+)", out)
        assert loss[1] == loss[2] != "nan"
    monkeypatch.undo()
    assert replay.main(["replay", f"--workdir={workdir}", "--step=2"]) == 1
    assert f"step 2 of {workdir} is not reproduced" in capsys.readouterr().out


def test_a_streak_stops_the_run_and_the_same_command_repeats_it(whole, spoiled, tmp_path, capsys):
    workdir = tmp_path / "w"
    with pytest.MonkeyPatch.context() as patch:
        spoiled_run.spoil("input", {4, 5, 6}, patch.setattr)
        for _ in range(2):
            assert run(workdir, train__keep=1) == 3
            err = capsys.readouterr().err
            assert "step 6: the loss is nan and the gradient's norm nan (bad step 3 in a" in err
            assert f"{workdir}/checkpoints/3; to run the step again" in err
            assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
    assert run(workdir, train__keep=1) == 0  # what spoiled it is gone: the run is whole
    assert lines(workdir) == lines(whole)
    for name in ("eval/step_000007.json", "rollouts/step_000005.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes()
    last, known = states(workdir)[7], states(whole)[7]
    jax.tree.map(np.testing.assert_array_equal, last, known)


def test_a_weight_stops_the_run_at_once_and_is_neither_saved_nor_exported(
    spoiled, tmp_path, capsys
):
    workdir, out = tmp_path / "w", tmp_path / "out"
    spoiled("weight", 4)
    assert run(workdir) == 3
    err = capsys.readouterr().err
    assert "the weights, optimizer or moving average are not finite after step 4" in err
    assert f"the last good checkpoint is {workdir}/checkpoints/3" in err
    assert sorted(states(workdir)) == [1, 2, 3]
    assert replay.main(["replay", f"--workdir={workdir}", "--step=4"]) == 0
    assert "not finite in the state: trained/q/b" in capsys.readouterr().out
    # A checkpoint with NaN, which a run cannot write, is neither continued nor read by others.
    broken = states(workdir)[3]
    lost = np.array(broken.trained["q"]["b"])
    lost[0, 0, 0] = np.nan
    broken = broken._replace(trained=broken.trained | {"q": broken.trained["q"] | {"b": lost}})
    with checkpoint.Checkpoints(workdir / "checkpoints", writer=True) as saver:
        saver.save(4, broken._replace(step=jnp.int32(4)))
    said = f"checkpoint 4 of {workdir}: not all numbers are finite in "
    assert run(workdir) == 3
    assert said in capsys.readouterr().err
    assert export.main(["export", f"--workdir={workdir}", f"--out={out}"]) == 3
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert evaluate.main(["evaluate", f"--workdir={workdir}", "--steps=4"]) == 3
    assert said in capsys.readouterr().err
    assert export.main(["export", f"--workdir={workdir}", f"--out={out}", "--step=3"]) == 0


def test_weights_of_the_model_are_checked_before_training(tmp_path, capsys):
    shape = {"vocab_size": 1472}
    config = transformer.SHAPES["tiny"].__class__(**{**vars(transformer.SHAPES["tiny"]), **shape})
    path = hub.resolve_model_path("tiny")
    params = transformer.init_params(config, jax.random.key(0), jnp.float32)
    folder = hf.save(
        tmp_path / "m", params, config, source_path=path, tokenizer=tokenizer.load(path)
    )
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if "layers.1" in name and "up_proj" in name)
    tensors[name][3, 4] = np.inf
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    settings = {"model__init": "pretrained", "model__shape": "", "model__path": folder}
    assert run(tmp_path / "w", **settings) == 3
    assert capsys.readouterr().err == (
        f"error: model.path is '{folder}': not all numbers are finite in layers/up/kernel\n"
    )
    assert not (tmp_path / "w" / "metrics.jsonl").exists()


def test_a_logit_of_the_sampler_costs_its_completion(spoiled, tmp_path, capsys):
    spoiled("logit")
    workdir = tmp_path / "w"
    assert run(workdir, train__steps=2, rollout__slots=16, eval__slots=8) == 0
    found = lines(workdir)
    assert [line["rollout_nonfinite"] for line in found] == [1, 1]
    assert [line["bad"] for line in found] == [0, 0]
    rows = [
        json.loads(row) for row in (workdir / "rollouts/step_000001.jsonl").read_text().splitlines()
    ]
    assert [row["finish"] == "nonfinite" for row in rows].count(True) == 1
    result = json.loads((workdir / "eval/step_000002.json").read_text())
    assert result["scores"]["en"]["nonfinite"] == 0.5
    out = capsys.readouterr().out
    assert "evaluation at step 2: 1 of 2 samples have logits that are not finite" in out
    assert re.search(r"rollout nonfinite\D+2\n", out)


# ---- two processes -----------------------------------------------------------------------------


def environment(devices: int) -> dict[str, str]:
    path = f"{conftest.ROOT}{os.pathsep}{conftest.ROOT / 'tests'}"
    known = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": "32"}
    return {**os.environ, **known, "PYTHONPATH": path}


def together(kind: str, steps: str, workdir, **more) -> list[tuple[int, str]]:
    """Exit code and stderr of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"mesh__coordinator": f"127.0.0.1:{port}", "mesh__processes": 2, "mesh__fsdp": 2}
    settings |= more
    started = [
        subprocess.Popen(
            [sys.executable, str(conftest.ROOT / "tests" / "spoiled_run.py"), kind, steps,
             *runs.argv("grpo", workdir, **SETTINGS | settings, mesh__process=rank)[1:]],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(1),
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [one.communicate(timeout=280)[1] for one in started]
    return [(one.returncode, err) for one, err in zip(started, ended, strict=True)]


def replayed(workdir, step: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "copsd_jax.replay", f"--workdir={workdir}", f"--step={step}"]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(2), cwd=conftest.ROOT
    )


@pytest.mark.parametrize("kind, steps, place", [("input", "3,4,5", "2"), ("weight", "3", "2")])
def test_two_processes_stop_together(tmp_path, kind, steps, place):
    workdir = tmp_path / "w"
    ended = together(kind, steps, workdir)
    assert [code for code, _ in ended] == [3, 3], ended
    for _, err in ended:
        assert f"the last good checkpoint is {workdir}/checkpoints/{place}" in err
    last = int(steps.split(",")[-1])
    assert len(lines(workdir)) == last
    done = replayed(workdir, last)
    assert done.returncode == 0, done.stdout + done.stderr
    where = "inputs: batch/advantage_BC" if kind == "input" else "state: trained/q/b"
    assert f"not finite in the {where}\n" in done.stdout


def test_two_processes_drop_the_same_completion(tmp_path):
    workdir = tmp_path / "w"
    ended = together("logit", "0", workdir, train__steps=2)
    assert [code for code, _ in ended] == [0, 0], ended
    assert all(line["rollout_nonfinite"] >= 1 for line in lines(workdir))
    assert all(line["bad"] == 0 for line in lines(workdir))
