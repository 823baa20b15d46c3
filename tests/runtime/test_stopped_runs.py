"""Whole runs that a signal stops, and that the same command continues."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import conftest
import pytest
import runs

PROGRAM = (sys.executable, "-m", "copsd_jax.main")
LAUNCHER = (sys.executable, "launch/local.py", "--processes=2")


def start(
    workdir: pathlib.Path, *program: str, pipe: int = subprocess.PIPE, **settings
) -> subprocess.Popen:
    values = {"train.steps": 6, "train.save_every": 100, "data.limit": 64, "eval.path": ""}
    flags = [f"--config.{name}={value}" for name, value in (values | settings).items()]
    return subprocess.Popen(
        [*program, "--config=configs/opsd.py:tiny", f"--workdir={workdir}", *flags],
        cwd=conftest.ROOT, stdout=pipe, stderr=pipe, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(conftest.ROOT)},
    )  # fmt: skip


def metrics(workdir: pathlib.Path) -> list[dict]:
    values = runs.steps_of(workdir)
    return [{k: v for k, v in one.items() if not k.startswith("seconds/")} for one in values]


def stop(run: subprocess.Popen, workdir: pathlib.Path, number: int, steps: int) -> tuple[int, str]:
    """Sends a signal after a number of steps; returns the exit code and what was printed."""
    while len(metrics(workdir)) < steps:
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    run.send_signal(number)
    _, err = run.communicate(timeout=120)
    assert "Traceback" not in err, err
    return run.returncode, err


def finish(run: subprocess.Popen) -> None:
    out, err = run.communicate(timeout=280)
    assert run.returncode == 0, (out, err)


def newest(workdir: pathlib.Path) -> int:
    return max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
@pytest.mark.parametrize("program", [PROGRAM, LAUNCHER], ids=["one", "two"])
def test_a_stopped_run_has_saved_its_last_step_and_continues(tmp_path, program):
    finish(start(tmp_path / "whole", *program))
    run = start(tmp_path / "w", *program)
    code, err = stop(run, tmp_path / "w", signal.SIGTERM, 2)
    assert code == 143
    assert "SIGTERM: stopping after the work at hand" in err
    done = len(metrics(tmp_path / "w"))
    assert 2 <= done < 6
    assert newest(tmp_path / "w") == done
    run = start(tmp_path / "w", *program)
    code, _ = stop(run, tmp_path / "w", signal.SIGINT, done + 1)
    assert code == 130
    assert newest(tmp_path / "w") == len(metrics(tmp_path / "w"))
    finish(start(tmp_path / "w", *program))
    assert metrics(tmp_path / "w") == metrics(tmp_path / "whole")


LEFT = {"train.grace": 0, "train.batch": 64}  # with no grace, each step would take too long


@pytest.mark.slow
def test_a_rollout_that_would_take_too_long_is_left(tmp_path):
    """The signal arrives in the rollout of step 3; the run saves step 2."""
    spec = {"kind": "phase", "phase": "rollout", "nth": 3, "after": 0, "signal": signal.SIGTERM}
    drill = (sys.executable, "tools/drill.py", "run", json.dumps(spec))
    run = start(tmp_path / "w", *drill, **LEFT)
    _, err = run.communicate(timeout=280)
    assert run.returncode == 143, err
    assert "SIGTERM: stopping now" in err
    assert "Traceback" not in err
    assert (newest(tmp_path / "w"), len(metrics(tmp_path / "w"))) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_leave_a_step_together(tmp_path, monkeypatch, rank):
    """The signal reaches one process in the rollout of step 3; both save step 2."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spec = {"kind": "phase", "phase": "rollout", "nth": 3, "after": 0, "signal": signal.SIGTERM}
    programs = [PROGRAM, PROGRAM]
    programs[rank] = (sys.executable, "tools/drill.py", "run", json.dumps(spec))
    mesh = {"mesh.coordinator": f"127.0.0.1:{port}", "mesh.processes": 2}
    both = [
        start(tmp_path / "w", *program, **LEFT | mesh | {"mesh.process": number})
        for number, program in enumerate(programs)
    ]
    ended = [one.communicate(timeout=280)[1] for one in both]
    assert [one.returncode for one in both] == [143, 143], ended
    assert ("SIGTERM: stopping now" in ended[0]) is (rank == 0)  # only the leader speaks
    assert "Traceback" not in "".join(ended)
    assert (newest(tmp_path / "w"), len(metrics(tmp_path / "w"))) == (2, 2)
