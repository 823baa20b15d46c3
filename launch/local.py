"""Several processes of one run on this machine's CPU, as several hosts would run it.

    python launch/local.py [--print] [--processes=N] [--devices=N] --config=configs/opsd.py [...]

All other arguments go to `python -m copsd_jax.main`. To try what a pod will do, or a change to code
that several processes run. Cost: nothing. Duration: that of one process, and longer: they share the
cores. As soon as one process ends with an error, the others are ended too, and the first line says
which it was. The same command again continues the run.
"""

import argparse
import os
import shlex
import socket
import subprocess
import sys
import time

# ---- settings ------------------------------------------------------------------------------------
PROCESSES = 2
DEVICES = 1  # CPU devices of each process; on the mesh there are PROCESSES x DEVICES
HEARTBEAT = 10  # seconds after which a silent process is dead, should this launcher be dead too
# --------------------------------------------------------------------------------------------------

LOOK = 0.2  # seconds between two looks at the processes
GRACE = 5.0  # seconds between asking a process to end and ending it


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def commands(processes: int, devices: int, port: int, rest: list[str]) -> list[list[str]]:
    """The command of each process."""
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


def run(todo: list[list[str]]) -> int:
    """Exit code: 0 if all processes end well, else that of the first that does not."""
    running = {rank: subprocess.Popen(command) for rank, command in enumerate(todo)}
    try:
        while running:
            for rank, one in list(running.items()):
                code = one.poll()
                if code is None:
                    continue
                del running[rank]
                if code:
                    said = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
                    others = f": ending the other {len(running)}" if running else ""
                    print(f"process {rank} of {len(todo)} {said}{others}", file=sys.stderr)
                    return code if code > 0 else 128 - code
            time.sleep(LOOK)
    except KeyboardInterrupt:
        return 130
    finally:
        end(running)
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="show what would be run")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--devices", type=int, default=DEVICES, help="of each process")
    known, rest = parser.parse_known_args(argv)
    for name in ("processes", "devices"):
        if getattr(known, name) < 1:
            parser.error(f"--{name} is {getattr(known, name)}: it must be at least 1")
    todo = commands(known.processes, known.devices, free_port(), rest)
    if known.print:
        print("\n".join(map(shlex.join, todo)))
        return 0
    os.environ.setdefault("NPROC", "32")  # threads for devices that wait for one another
    return run(todo)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
