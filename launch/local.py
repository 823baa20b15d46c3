"""Runs several processes of one run on the CPU of this machine, in place of several hosts.

    python launch/local.py [--print] [--processes=N] [--devices=N] --config=configs/opsd.py [...]

All other arguments are passed to `python -m copsd_jax.main`. Use this script to try a run before
you start it on a pod, or to test code that several processes run. The script costs nothing. The run
takes longer than with a single process, because the processes share the cores. If a process ends
with an error, the script ends the other processes, and prints which process failed. After Ctrl-C or
SIGTERM, all processes save the run and end. A second signal kills all processes. If this script
itself is killed, Linux sends SIGTERM to the processes, which save the run. On other systems, the
processes go on. To continue the run, start the same command again.
"""

import argparse
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection

# ---- settings ------------------------------------------------------------------------------------
PROCESSES = 2
DEVICES = 1  # CPU devices per process; the mesh has PROCESSES x DEVICES devices
HEARTBEAT = 10  # a process counts as dead after so many silent seconds, even without a launcher
# --------------------------------------------------------------------------------------------------

LOOK = 0.2  # seconds between two checks of the processes
GRACE = 5.0  # seconds between terminating a process and killing it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = (130, 143)  # exit codes of a process that a signal has stopped, after it has saved
SKIPPED = 4  # exit code of a process whose run has ended, but skipped steps that failed
PR_SET_PDEATHSIG = 1  # Linux: sets the signal that a process gets when its parent ends
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def commands(processes: int, devices: int, port: int, rest: list[str]) -> list[list[str]]:
    """Returns the command of each process."""
    return [
        [
            "env", "JAX_PLATFORMS=cpu", f"JAX_NUM_CPU_DEVICES={devices}",
            sys.executable, "-m", "copsd_jax.main", *rest,
            f"--config.mesh.coordinator=127.0.0.1:{port}", f"--config.mesh.processes={processes}",
            f"--config.mesh.process={rank}", f"--config.mesh.heartbeat={HEARTBEAT}",
        ]
        for rank in range(processes)
    ]  # fmt: skip


def end(running: dict[int, subprocess.Popen]) -> None:
    for one in running.values():
        one.terminate()
    until = time.monotonic() + GRACE
    for one in running.values():
        try:
            one.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()


def begin(parent: int, mask: Collection[int]) -> None:
    """Prepares a new process: on Linux, it gets SIGTERM when the process `parent` ends."""
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent has ended before the call
            os._exit(128 + signal.SIGTERM)


def run(todo: list[list[str]]) -> int:
    """Returns 0 if all processes succeed, or the exit code of the first process that fails."""
    running: dict[int, subprocess.Popen] = {}
    asked = [0]  # the number of signals so far

    def stop(number: int, _: object) -> None:
        asked[0] += 1
        first = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        for one in list(running.values()):
            one.send_signal(first if asked[0] == 1 else signal.SIGKILL)

    for number in SIGNALS:
        signal.signal(number, stop)
    worst, parent = 0, os.getpid()
    try:
        # A signal waits until all processes have started, so that `stop` reaches all processes.
        # Each process has a session of its own, so that Ctrl-C reaches it only through `stop`.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for rank, command in enumerate(todo):
            running[rank] = subprocess.Popen(
                command, start_new_session=True, preexec_fn=lambda: begin(parent, mask)
            )
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while running:
            for rank, one in list(running.items()):
                code = one.poll()
                if code is None:
                    continue
                del running[rank]
                said = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                code = code if code >= 0 else 128 - code
                if code == SKIPPED:  # the other processes end in the same way
                    print(f"process {rank} of {len(todo)} {said}", file=sys.stderr)
                elif code and not (asked[0] and code in STOPPED):
                    others = f": ending the other {len(running)}" if running else ""
                    print(f"process {rank} of {len(todo)} {said}{others}", file=sys.stderr)
                    return code
                worst = max(worst, code)
            time.sleep(LOOK)
    finally:
        end(running)
    return worst


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--print", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--devices", type=int, default=DEVICES, help="CPU devices per process")
    known, rest = parser.parse_known_args(argv)
    for name in ("processes", "devices"):
        if getattr(known, name) < 1:
            parser.error(f"--{name} is {getattr(known, name)}: it must be at least 1")
    todo = commands(known.processes, known.devices, free_port(), rest)
    if known.print:
        print("\n".join(map(shlex.join, todo)))
        return 0
    os.environ.setdefault("NPROC", "32")  # enough threads for devices that wait for each other
    return run(todo)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
