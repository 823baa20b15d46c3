"""Two processes against one with as many devices: the same run, file for file.

And what a process is told by the one that leads, how a run ends when one dies, and goes on.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import conftest
import pytest
import runs

from copsd_jax.config import setting_rules, settings
from copsd_jax.runtime import processes

LAUNCH = conftest.ROOT / "launch" / "local.py"
CARD = conftest.ROOT / "configs" / "copsd.py"
SETTINGS = [
    f"--config={CARD}:tiny", "--config.train.steps=2", "--config.train.save_every=1",
    "--config.eval.limit=2",
]  # fmt: skip


def launch(folder: pathlib.Path, count: int, devices: int, *settings: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(LAUNCH), f"--processes={count}", f"--devices={devices}", *SETTINGS,
         f"--workdir={folder}", *settings],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "NPROC": "32"},
    )  # fmt: skip


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ended(started: subprocess.Popen) -> tuple[str, str]:
    out, err = started.communicate(timeout=280)
    assert started.returncode == 0, err[-3000:]
    return out, err


def close(a: Any, b: Any, name: str = "") -> None:
    """Equal, numbers to rounding in another order; what clocks say is left out."""
    if name.startswith(("seconds/", "tokens_per")):
        return
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key], key)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y, name)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-3, abs=2e-5), name
    else:
        assert a == b, name


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(tmp_path):
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
    out, err = ended(launch(tmp_path / "two", 2, 2, *mesh))
    ended(launch(tmp_path / "one", 1, 4, *mesh))
    assert out.count("a random model of two layers") == 1  # one process speaks
    assert err.count("step 2/2") == 1
    one, two = tmp_path / "one", tmp_path / "two"
    names = {str(path.relative_to(one)) for path in one.glob("*/step_*.json*")}
    assert len(names) >= 4
    assert names == {str(path.relative_to(two)) for path in two.glob("*/step_*.json*")}
    for name in names:
        if name.endswith(".jsonl"):
            close(lines(one / name), lines(two / name))
        else:
            close(json.loads((one / name).read_text()), json.loads((two / name).read_text()))
    close(lines(one / "metrics.jsonl"), lines(two / "metrics.jsonl"))
    assert len(runs.steps_of(two)) == 2


def children(pid: int) -> list[int]:
    found = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found]


@pytest.mark.slow
def test_when_one_dies_all_end_and_the_same_command_continues(tmp_path):
    first = launch(tmp_path / "w", 2, 1, "--config.train.steps=12")
    while not list((tmp_path / "w").glob("checkpoints/1*")):
        assert first.poll() is None, first.communicate()[1][-3000:]
        time.sleep(0.1)
    ranks = children(first.pid)
    assert len(ranks) == 2
    begun = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    _, err = first.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert first.returncode == 137
    assert "process 1 of 2 was killed by signal 9: ending the other 1" in err
    assert not any(pathlib.Path(f"/proc/{rank}").exists() for rank in ranks)
    before = len(runs.steps_of(tmp_path / "w"))
    assert before < 12
    ended(launch(tmp_path / "w", 2, 1, "--config.train.steps=12"))
    steps = [line["step"] for line in runs.steps_of(tmp_path / "w")]
    assert steps == list(range(1, 13))


TOLD = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from copsd_jax.config import settings
from copsd_jax.runtime import processes
c = settings.default()
c.mesh.coordinator, c.mesh.processes, c.mesh.process = sys.argv[2], 2, int(sys.argv[1])
processes.join_processes(c)
calls = []
def work():
    calls.append(1)
    return {"rank": jax.process_index(), "long": "x" * 5000}
told = processes.run_on_leader(work)
def fails():
    raise ValueError("of the first")
try:
    processes.run_on_leader(fails)
except ValueError as error:
    said = str(error)
try:  # the others must not wait for what cannot be sent
    processes.run_on_leader(lambda: work.__get__(sys))
    said += ", nothing"
except (RuntimeError, TypeError, AttributeError):
    said += ", unsent"
processes.wait_for_all("end")
print(told["rank"], len(told["long"]), len(calls), said, file=sys.stderr)
print("spoken")
"""


@pytest.mark.slow
def test_the_leading_process_works_for_all():
    port = 20000 + os.getpid() % 20000
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOLD, str(rank), f"127.0.0.1:{port}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    both = [one.communicate(timeout=120) for one in started]
    assert [one.returncode for one in started] == [0, 0], both
    said = [err.splitlines()[-1] for _, err in both]
    assert said == ["0 5000 1 of the first, unsent", "0 5000 0 of the first, unsent"]
    assert ["spoken" in out for out, _ in both] == [True, False]


DAMAGED = """
import pathlib, sys
import jax
jax.config.update("jax_platforms", "cpu")
from copsd_jax.config import settings
from copsd_jax.runtime import checkpoint, processes
c = settings.default()
c.mesh.coordinator, c.mesh.processes, c.mesh.process = sys.argv[2], 2, int(sys.argv[1])
processes.join_processes(c)
def load(path, like):
    if jax.process_index():
        raise ValueError("only this process reads the file")
    return like
checkpoint.ocp.load_checkpointables = load
try:
    said = checkpoint._load(pathlib.Path("c/1"), {"state": 1})
except checkpoint.DamagedCheckpoint as error:
    said = error
processes.wait_for_all("end")
print(said, file=sys.stderr)
"""


@pytest.mark.slow
def test_the_processes_agree_that_a_checkpoint_without_manifest_is_damaged():
    port = 20000 + (os.getpid() + 1) % 20000
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DAMAGED, str(rank), f"127.0.0.1:{port}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    both = [one.communicate(timeout=120) for one in started]
    assert [one.returncode for one in started] == [0, 0], both
    said = "checkpoint 1 in c is damaged (it cannot be loaded: only this process reads the file)"
    assert [err.splitlines()[-1] for _, err in both] == [said] * 2


def test_alone_nothing_is_broadcast():
    assert processes.is_leader()
    assert processes.run_on_leader(lambda: 3) == 3
    with pytest.raises(KeyError):
        processes.run_on_leader(lambda: {}["absent"])
    processes.wait_for_all("nobody else")
    processes.join_processes(settings.default())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"coordinator": "host"}, r"mesh.coordinator is 'host': it must be '' .one process., auto"),
        ({"processes": 2}, r"mesh.processes is 2: it needs host:port as mesh.coordinator"),
        (
            {"coordinator": "auto", "process": 1},
            r"mesh.process is 1: it needs host:port",
        ),
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            r"mesh.process is 2: it must be at",
        ),
        ({"heartbeat": 0}, r"mesh.heartbeat is 0: it must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, said):
    c = settings.default()
    c.mesh.update(values)
    with pytest.raises(ValueError, match=said):
        setting_rules.check_settings(c)


def test_the_launcher_prints_its_commands():
    args = [sys.executable, str(LAUNCH), "--print", "--processes=3", "--devices=4", *SETTINGS]
    shown = subprocess.run(args, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(shown) == 3
    for rank, line in enumerate(shown):
        assert f"--config.mesh.process={rank} " in line
        assert "JAX_NUM_CPU_DEVICES=4" in line
        assert all(setting in line for setting in SETTINGS)


CLOCKS = """
import sys
from copsd_jax import main
from copsd_jax.metrics import terminal
take = terminal.Timer.take
if "--config.mesh.process=1" in sys.argv:
    terminal.Timer.take = lambda timer: {name: 1000.0 for name in take(timer)}
sys.exit(main.main(sys.argv))
"""


@pytest.mark.slow
def test_guards_use_the_clock_of_the_leading_process(tmp_path):
    """By the clock of the second process, each step takes 1000 seconds, and the rule stops it."""
    port = 20000 + os.getpid() % 20000
    flags = [
        *SETTINGS, f"--workdir={tmp_path / 'w'}", "--config.eval.path=", "--config.data.limit=16",
        "--config.train.batch=4", "--config.rollout.max_tokens=4",
        "--config.guards.rules=seconds/step>900:stop", "--config.mesh.processes=2",
        f"--config.mesh.coordinator=127.0.0.1:{port}", "--config.mesh.heartbeat=10",
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CLOCKS, *flags, f"--config.mesh.process={rank}"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=conftest.ROOT,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "NPROC": "32"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        both = [one.communicate(timeout=240) for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0, 0], [err[-2000:] for _, err in both]
    assert [line["step"] for line in runs.steps_of(tmp_path / "w")] == [1, 2]
