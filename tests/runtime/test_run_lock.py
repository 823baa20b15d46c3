"""Locks of a work directory. Oracle: other processes, real ones, and what they may do."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import conftest
import pytest
import runs

from copsd_jax import main
from copsd_jax.runtime import run_lock

HOLD = """
import errno, fcntl, os, pathlib, sys, time
from copsd_jax.runtime import run_lock
if sys.argv[2] == "lease":  # as on a file system without locks
    def flock(*_):
        raise OSError(errno.ENOTSUP, "not supported")
    fcntl.flock = flock
if sys.argv[3] == "quick":
    run_lock.BEAT, run_lock.STALE = 0.2, 1.0
with run_lock.hold(pathlib.Path(sys.argv[1])):
    print("held", time.monotonic(), flush=True)
    sys.stdin.readline()
print("left", time.monotonic(), flush=True)
"""


def start(directory, kind, speed="quick"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), kind, speed],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(conftest.ROOT)},
    )  # fmt: skip
    return process


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.2)
    monkeypatch.setattr(run_lock, "STALE", 1.0)


@pytest.fixture
def without_flock(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)


@pytest.mark.parametrize("kind", ["flock", "lease"])
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, quick, request, kind):
    if kind == "lease":
        request.getfixturevalue("without_flock")
    first = start(tmp_path / "w", kind)
    assert first.stdout.readline().startswith("held ")
    before = sorted(p.name for p in (tmp_path / "w").iterdir())
    said = rf"in use by process {first.pid} on {socket.gethostname()}: wait until it ends"
    with pytest.raises(run_lock.LockedError, match=said), run_lock.hold(tmp_path / "w"):
        pass
    if kind == "flock":
        with pytest.raises(run_lock.LockedError, match=said):
            run_lock.check(tmp_path / "w")
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == before == ["lease.json", "lock"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    run_lock.check(tmp_path / "w")
    begun = time.monotonic()
    with run_lock.hold(tmp_path / "w"):  # the lock does not outlive its holder
        assert time.monotonic() - begun < 0.5
        assert json.loads((tmp_path / "w/lease.json").read_text())["pid"] == os.getpid()
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["lock"]


def test_a_lease_of_another_host_is_watched(tmp_path, quick, capsys):
    """A lease that changes is held; one that does not change for STALE seconds is taken over."""
    lease = tmp_path / "lease.json"
    other = {"host": "elsewhere", "pid": 7, "time": 0, "token": "x"}
    lease.write_text(json.dumps(other))
    code = (
        "import os, pathlib, sys, time\n"
        "for _ in range(40):\n    pathlib.Path(sys.argv[1]).touch(); time.sleep(0.1)"
    )
    beating = subprocess.Popen([sys.executable, "-c", code, str(lease)])
    try:
        with (
            pytest.raises(run_lock.LockedError, match="by process 7 on elsewhere"),
            run_lock.hold(tmp_path),
        ):
            pass
    finally:
        beating.kill()
        beating.wait()
    assert json.loads(lease.read_text()) == other
    lease.touch()
    begun = time.monotonic()
    with run_lock.hold(tmp_path):
        assert time.monotonic() - begun > 0.8
        assert "whether process 7 on elsewhere still runs" in capsys.readouterr().out
    # A container of the same host name has process ids of its own: here, 2**22 + 1 is no process.
    with run_lock.hold(tmp_path):
        same = json.loads(lease.read_text()) | {"pid": 2**22 + 1}
    lease.write_text(json.dumps({**same, "namespace": "another"}))
    begun = time.monotonic()
    with run_lock.hold(tmp_path):
        assert time.monotonic() - begun > 0.8
    lease.write_text(json.dumps(same))
    begun = time.monotonic()
    with run_lock.hold(tmp_path):
        assert time.monotonic() - begun < 0.5
    # One that is already old is taken at once, whatever this machine's clock says.
    lease.write_text(json.dumps(other))
    os.utime(lease, (time.time() - 60, time.time() - 60))
    begun = time.monotonic()
    with run_lock.hold(tmp_path):
        assert time.monotonic() - begun < 0.5


@pytest.mark.parametrize("change", [{"pid": "x"}, {"pid": 10**30}, {"pid": 0}, {"host": [1]}])
def test_a_lease_of_wrong_types_is_that_of_another_process(tmp_path, quick, capsys, change):
    lease = tmp_path / "lease.json"
    lease.write_text(json.dumps(run_lock._describe_holder() | change))
    assert "in use by another process: wait" in str(
        run_lock._refuse(tmp_path, run_lock._read_holder(lease))
    )
    with run_lock.hold(tmp_path):
        assert json.loads(lease.read_text())["pid"] == os.getpid()
    assert "whether another process still runs in" in capsys.readouterr().out


def test_the_clock_is_that_of_the_file_system(tmp_path, quick, monkeypatch):
    """With this machine's clock an hour fast, a fresh lease stays fresh."""
    (tmp_path / "lease.json").write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    monkeypatch.setattr(run_lock.time, "time", lambda: 4e9)
    begun = time.monotonic()
    with run_lock.hold(tmp_path):
        assert time.monotonic() - begun > 0.8


def test_the_lease_is_renewed_and_its_loss_ends_the_process(tmp_path):
    first = start(tmp_path, "lease")
    assert first.stdout.readline().startswith("held ")
    lease = tmp_path / "lease.json"
    beats = set()
    end = time.monotonic() + 20
    while len(beats) < 3 and time.monotonic() < end:
        beats.add(json.loads(lease.read_text())["beat"])
        time.sleep(0.05)
    assert len(beats) == 3
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 7, "token": "other"}))
    assert first.wait(20) == 1
    assert "process 7 on elsewhere has taken over" in first.stderr.read()
    assert json.loads(lease.read_text())["host"] == "elsewhere"


def test_a_holder_that_was_suspended_does_not_go_on(tmp_path):
    """Meanwhile, another process has taken the lease, and has ended."""
    first = start(tmp_path, "lease")
    assert first.stdout.readline().startswith("held ")
    first.send_signal(signal.SIGSTOP)
    (tmp_path / "lease.json").unlink()
    time.sleep(1.5)
    first.send_signal(signal.SIGCONT)
    assert first.wait(20) == 1
    assert "another process has taken over" in first.stderr.read()
    assert not (tmp_path / "lease.json").exists()


@pytest.mark.slow
def test_of_two_that_take_a_lease_at_once_one_is_refused(tmp_path, quick, without_flock):
    both = [start(tmp_path, "lease", "usual") for _ in range(2)]
    for one in both:
        one.stdin.close()  # each ends once it has had the lock
    for one in both:
        one.wait(30)
    ended = [(one.stdout.read(), one.stderr.read()) for one in both]
    refused = [err for one, (_, err) in zip(both, ended, strict=True) if one.returncode]
    assert len(refused) < 2
    assert all("LockedError" in err for err in refused)
    # Where both have had it, one left it before the other took it: CLOCK_MONOTONIC is the system's.
    marks = [re.findall(r"^(?:held|left) (.+)$", out, re.MULTILINE) for out, _ in ended]
    times = [[float(x) for x in mark] for mark in marks]
    held = [time for interval in sorted(times) for time in interval]
    assert held == sorted(held)
    assert len(held) == 4 - 2 * len(refused)


def test_a_second_run_is_refused_before_it_changes_anything(tmp_path, capsys):
    directory = tmp_path / "w"
    with run_lock.hold(directory):
        (directory / "metrics.jsonl").write_text('{"step": 1}\n')
        before = {p.name: p.read_bytes() for p in directory.iterdir()}
        assert main.main(runs.argv("copsd", directory)) == 2
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    said = f"error: --workdir={directory} is in use by process {os.getpid()} on "
    assert capsys.readouterr().err.startswith(said)
