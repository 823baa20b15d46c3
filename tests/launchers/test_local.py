"""The launcher of local processes: signals, exit codes, output, and that it leaves no process.

The program is a stand-in that writes down what happens to it.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import conftest
import pytest

ENV = shutil.which("env")

# It tells its process id and arguments, then waits for a signal. Once the file `go` exists, it ends
# with the exit code CODES[rank], if it has one.
PROGRAM = """
import json, os, signal, sys, time
rank = int([a for a in sys.argv if a.startswith("--config.mesh.process=")][0].split("=")[1])

def tell(*values):
    os.write(1, json.dumps([rank, *values]).encode() + b"\\n")  # one write, so lines stay whole

def stop(number, _):
    tell(signal.Signals(number).name)
    if not os.environ.get("DEAF"):
        time.sleep(0.3)  # it saves
        sys.exit(128 + number)

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, stop)
tell(os.getpid(), sys.argv[1:])
code = json.loads(os.environ["CODES"]).get(str(rank))
while code is None or not os.path.exists("go"):
    time.sleep(0.02)
os.write(2, f"process {rank} says why\\n".encode())
sys.exit(code)
"""


@pytest.fixture
def launch(tmp_path):
    (tmp_path / "copsd_jax").mkdir()
    (tmp_path / "copsd_jax" / "__init__.py").touch()
    (tmp_path / "copsd_jax" / "main.py").write_text(PROGRAM)
    started = []

    def start(*arguments, processes=3, codes=None, **settings):
        command = [
            sys.executable,
            conftest.ROOT / "launch" / "local.py",
            f"--processes={processes}",
        ]
        environment = os.environ | {"CODES": json.dumps(codes or {})} | settings
        environment.pop("PYTHONPATH", None)
        started.append(
            subprocess.Popen(
                [*command, *arguments], cwd=tmp_path, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for one in started:
        one.kill()


def said(launcher, count):
    """The next lines of the processes, in the order of their ranks."""
    return sorted(json.loads(launcher.stdout.readline()) for _ in range(count))


def alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids):
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.parametrize(
    "number, passed, code",
    [
        (signal.SIGTERM, "SIGTERM", 143),
        (signal.SIGINT, "SIGINT", 130),
        (signal.SIGHUP, "SIGTERM", 143),
    ],
)
@pytest.mark.parametrize("group", [False, True], ids=["launcher", "group"])
def test_a_signal_reaches_all_processes_once(launch, number, passed, code, group):
    """Ctrl-C in a terminal goes to the whole group."""
    launcher = launch()
    pids = [pid for _, pid, _ in said(launcher, 3)]
    assert all(map(alive, pids))
    os.killpg(launcher.pid, number) if group else launcher.send_signal(number)
    out, err = launcher.communicate(timeout=60)
    assert sorted(map(json.loads, out.splitlines())) == [[rank, passed] for rank in range(3)]
    assert (launcher.returncode, err) == (code, "")
    assert not any(map(alive, pids))


def test_a_signal_at_the_start_leaves_no_process(launch, tmp_path):
    """The first process of eight signals the launcher, which is starting the others."""
    (tmp_path / "bin").mkdir()
    text = f'#!/bin/sh\nmkdir {tmp_path}/first 2> /dev/null && kill -TERM $PPID\nexec {ENV} "$@"\n'
    (tmp_path / "bin" / "env").write_text(text)
    (tmp_path / "bin" / "env").chmod(0o755)
    launcher = launch(processes=8, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    launcher.communicate(timeout=60)
    assert launcher.returncode == 143
    mine = str(tmp_path).encode()
    for path in pathlib.Path("/proc").glob("[0-9]*/cwd"):
        try:
            assert os.fsencode(os.readlink(path)) != mine or not alive(path.parent.name)
        except (FileNotFoundError, PermissionError):
            continue


def test_a_second_signal_kills_what_does_not_end(launch):
    launcher = launch(DEAF="1")
    pids = [pid for _, pid, _ in said(launcher, 3)]
    launcher.send_signal(signal.SIGTERM)
    assert said(launcher, 3) == [[rank, "SIGTERM"] for rank in range(3)]
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 137
    assert not any(map(alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")
def test_the_processes_of_a_killed_launcher_are_asked_to_end(launch):
    launcher = launch()
    pids = [pid for _, pid, _ in said(launcher, 3)]
    launcher.kill()
    assert launcher.wait(60) == -signal.SIGKILL
    assert said(launcher, 3) == [[rank, "SIGTERM"] for rank in range(3)]
    assert gone(pids)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130, 143])
def test_the_exit_code_is_that_of_the_first_process_that_fails(launch, tmp_path, code):
    launcher = launch(codes={1: code} if code else {0: 0, 1: 0, 2: 0})
    pids = [pid for _, pid, _ in said(launcher, 3)]
    (tmp_path / "go").touch()
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == code
    assert "process 1 says why\n" in err
    assert (f"process 1 of 3 ended with {code}: ending the other 2\n" in err) == (code != 0)
    others = [[0, "SIGTERM"], [2, "SIGTERM"]] if code else []
    assert sorted(map(json.loads, out.splitlines())) == others
    assert not any(map(alive, pids))


def test_a_process_that_skipped_steps_ends_no_other(launch, tmp_path):
    """Exit code 4: the run has ended, and the other processes end by themselves."""
    launcher = launch(processes=2, codes={0: 4})
    said(launcher, 2)
    (tmp_path / "go").touch()
    assert launcher.stderr.readline() == "process 0 says why\n"
    assert launcher.stderr.readline() == "process 0 of 2 ended with 4\n"
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=60)
    assert out == '[1, "SIGTERM"]\n'
    assert launcher.returncode == 143


def test_arguments_pass_unchanged(launch, tmp_path):
    (tmp_path / "go").touch()
    odd = ["--config=a b.py:x", '--config.rollout.stop=it\'s "a" $(b)\n&', "--workdir=ü w", "--d=1"]
    launcher = launch(*odd, processes=1, codes={0: 0})
    ((_, _, arguments),) = said(launcher, 1)
    assert arguments[: len(odd)] == odd
    assert [a.partition("=")[0] for a in arguments[len(odd) :]] == [
        f"--config.mesh.{name}" for name in ("coordinator", "processes", "process", "heartbeat")
    ]
    launcher.communicate(timeout=60)
