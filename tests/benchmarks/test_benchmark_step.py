"""Oracles: FLOP counted pair by pair and matrix by matrix, torch's loss and gradient."""

import importlib
import importlib.util
import json
import subprocess
import sys

import conftest
import pytest

BENCHMARKS = conftest.ROOT / "benchmarks"


@pytest.fixture(scope="module")
def step():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("step")
    sys.path.remove(str(BENCHMARKS))


def test_pairs_that_may_see_each_other(step):
    assert step.pairs(3, 2) == 4 + 5
    assert step.pairs(0, 7) == sum(1 for i in range(7) for j in range(7) if j <= i)


def test_flop_of_every_matrix(step):
    """Token by token, matrix by matrix: 2 for each weight forward and backward to the input, and
    for a weight that trains 2 more."""
    sizes = {"q": (8, 6), "down": (10, 8)}
    shape = {
        "d_model": 8, "n_layers": 3, "n_heads": 2, "head_dim": 3, "vocab_size": 50,
        "projections": sizes,
    }  # fmt: skip
    work = {"batch": 2, "prompt": 4, "completion": 3, "teacher": 5, "rank": 2}
    want = dict.fromkeys(("rollout", "teacher", "student", "loss"), 0)
    for _ in range(work["batch"]):
        for a, b in 3 * list(sizes.values()):
            base, adapter = 2 * a * b, 2 * (a * 2 + 2 * b)
            want["rollout"] += (4 + 3 - 1) * (base + adapter)
            want["teacher"] += (5 + 3) * base
            want["student"] += (4 + 3) * (2 * base + 3 * adapter)
        # Queries times keys, weights times values, of 2 heads of 3 in 3 layers.
        seen = lambda length: sum(3 * 2 * (i + 1) * (2 * 3 + 2 * 3) for i in range(length))  # noqa: E731
        want["rollout"] += seen(6)
        want["teacher"] += seen(8)
        want["student"] += 3 * seen(7)
        want["rollout"] += 3 * 2 * 8 * 50
        want["loss"] += 3 * 3 * 2 * 8 * 50
    assert step.flop(shape, work) == want


def test_ratios_and_agreement(step):
    parts = dict.fromkeys(step.TRAINED, 2.0)
    line = lambda loss, training, **more: {  # noqa: E731
        "seconds": 4.0, "cpu_seconds": 6.0, "parts": {"rollout": 1.0} | training,
        "cpu_parts": {"rollout": 3.0} | training, "peak_bytes": 10, "loss": [1.0, loss],
        "grad_norm": [2.0, 2.0], **more,
    }  # fmt: skip
    torch = line(2.0, parts) | {"seconds": 10.0, "peak_bytes": 40}
    ours = line(2.0001, {"training": 5.0}, programs=parts | {"loss": 0.5}, cpu_programs=parts)
    found = step.compared(ours, torch)
    assert found["steps_per_hour"] == 2.5
    assert found["parts"]["loss"] == 4.0
    assert found["parts"]["training"] == 8.0 / 5.0
    assert found["memory"] == 0.25
    assert found["loss_difference"] == pytest.approx(0.5e-4)
    assert found["agrees"]
    assert not step.compared(ours | {"loss": [1.0, 2.0003]}, torch)["agrees"]
    assert not step.compared(ours | {"grad_norm": [2.0, 2.003]}, torch)["agrees"]


TINY = ["--shape=tiny", "--batch=4", "--prompt=60", "--completion=8", "--teacher=120", "--rank=4"]


def lines(*argv):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "step.py"), *TINY, *argv],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["system"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    "given, said",
    [
        ("--batch=0", "--batch is 0: it must be at least 1"),
        ("--mesh=2,2", "--mesh is '2,2': write data,fsdp,tensor"),
        ("--divergence=l2", "--divergence has l2: choices are fkl, jsd"),
        ("--batches=2", "unknown: --batches=2; settings are --config.name=value"),
    ],
)
def test_wrong_sizes_are_named(step, capsys, given, said):
    with pytest.raises(SystemExit) as ended:
        step.parse([given])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_both_systems_agree():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    found = lines("--steps=1", "--divergence=jsd", "--repetitions=0")
    assert found["compared"]["agrees"]
    assert set(found["torch"]["parts"]) >= {"rollout", "teacher", "student", "loss", "update"}
    assert found["ours"]["seconds"] == pytest.approx(sum(found["ours"]["parts"].values()), rel=0.05)


@pytest.mark.slow
def test_a_mesh(tmp_path):
    found = lines(
        "--mesh=1,4,1", "--devices=4", "--systems=ours", "--steps=1", "--repetitions=1",
        f"--profile={tmp_path}",
    )  # fmt: skip
    line = found["ours"]
    assert (line["devices"], line["mesh"]) == (4, [1, 4, 1])
    assert set(line["programs"]) == {"teacher", "student", "loss", "update"}
    assert list(tmp_path.rglob("*.trace.json.gz"))
