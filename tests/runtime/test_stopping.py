"""Signals that ask a run to stop: what they raise, and when."""

import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from copsd_jax.runtime import signals, stopping


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def request_():
    """A stop request that hears signals; the handlers of pytest are put back at the end."""
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    one = stopping.StopRequest()
    with one.listen(grace=60):
        yield one
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_obeyed_at_the_next_point(request_, number, code):
    request_.obey()
    send(number)
    with pytest.raises(signals.Stopped) as stopped:
        request_.obey()
    assert stopped.value.exit_code == code  # 128 + number, as of shells
    assert stopped.value.signal.name in str(stopped.value)


@pytest.mark.parametrize(
    "seconds, reserve, leaves",
    [(50, 0, False), (61, 0, True), (math.inf, 0, True), (50, 5, False), (50, 11, True),
     (-30, 50, False), (-30, 61, True)],
)  # fmt: skip
def test_work_is_left_only_if_it_is_saved_after_the_grace_of_60_seconds(
    request_, seconds, reserve, leaves
):
    """Work that should have ended 30 seconds ago ends now at the earliest."""
    reached = []

    def work() -> None:
        with request_.leave_if_late(time.monotonic() + seconds, reserve):
            send(signal.SIGTERM)
            request_.poll()
            reached.append(1)

    if leaves:
        with pytest.raises(signals.Stopped):
            work()
    else:
        work()
    assert len(reached) == (not leaves)
    request_.poll()  # outside such a block, nothing is left


def test_work_does_not_begin_after_a_signal_if_it_would_end_too_late(request_):
    send(signal.SIGTERM)
    with request_.leave_if_late(time.monotonic() + 1):
        pass
    with pytest.raises(signals.Stopped), request_.leave_if_late(math.inf):
        raise AssertionError("the block has begun")


def test_no_handler_of_exceptions_keeps_a_run_from_stopping(request_):
    def retry() -> None:
        try:
            send(signal.SIGTERM)
        except Exception:
            raise AssertionError("a retry has caught the request to stop") from None

    with pytest.raises(signals.Stopped), request_.leave_if_late(math.inf):
        retry()


def test_other_threads_than_the_main_one_set_no_handlers():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    seen = []

    def listen() -> None:
        with stopping.StopRequest().listen(1):
            seen.extend(signal.getsignal(number) for number in signals.SIGNALS)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == before


PROGRAM = """
import os, signal, sys, time
from copsd_jax.runtime import signals, stopping
def send(): os.kill(os.getpid(), signal.SIGTERM)
if sys.argv[1] == "twice":
    with stopping.StopRequest().listen(60):
        send()
        print("noted", flush=True)
        send()
        time.sleep(60)  # the system may give the signal to another thread first
        print("still alive", flush=True)
signals.end_at_once()
try:
    send()
    time.sleep(60)
finally:
    print("cleaned up", flush=True)
"""


@pytest.mark.parametrize(
    "kind, out, err",
    [
        ("twice", "noted\n", "SIGTERM: stopping after"),
        ("early", "", "stopped by SIGTERM: to start again or to continue, repeat the command"),
    ],
)
def test_a_second_signal_and_an_early_one_end_the_process_without_clean_up(kind, out, err):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (143, out)
    assert err in done.stderr
    assert "Traceback" not in done.stderr


WITHOUT_READER = """
import os, signal, sys, time
from copsd_jax.runtime import startup, stopping
startup.begin()
print("begun", flush=True)
sys.stdin.readline()  # now the reader has gone
with stopping.StopRequest().listen(60):
    os.kill(os.getpid(), signal.SIGTERM)  # its handler writes too
    for _ in range(1000):
        print("a line " * 20)
        print("another", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write("saved")
print("pending at the exit")
sys.exit(7)
"""


def test_output_without_a_reader_is_dropped(tmp_path):
    """The exit code is that of the program: Python's own would be 1, or 120 for unwritten text."""
    out, into = os.pipe()
    run = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_READER, str(tmp_path / "file")],
        stdin=subprocess.PIPE, stdout=into, stderr=into, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    os.close(into)
    assert os.read(out, 100).startswith(b"begun")
    os.close(out)
    run.communicate("\n", timeout=120)
    assert run.returncode == 7
    assert (tmp_path / "file").read_text() == "saved"
