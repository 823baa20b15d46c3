"""Ends a run that is started again and again without progress; the launchers call this module.

    python -m copsd_jax.runtime.tries --workdir=W --attempt=2 --limit=3 [-- -m copsd_jax.main ...]

A launcher gives each start of a run a number: 0 for a start by the user, then 1, 2 and so on. A
start makes progress if it adds a checkpoint, a step to the metrics, or a completion to an
evaluation. At most `--limit` starts in a row may make no progress; the next start is refused with
exit code 2. If a start is not refused, Python with the arguments after `--` replaces this process.
The program itself therefore receives the signals and returns the exit code. W/tries.json contains
the count. This module does not import JAX.
"""

import argparse
import json
import os
import pathlib
import socket
import sys
from typing import NamedTuple

from copsd_jax.runtime import storage

FILE = "tries.json"


class Progress(NamedTuple):
    """The progress of a run up to now; no attribute decreases while the run makes progress.

    Attributes:
      checkpoint: the step of the newest checkpoint, or -1 if no checkpoint exists.
      steps: the number of lines of the metrics.
      evaluation: the number of complete evaluations, and the number of completions in incomplete
        evaluations. Pairs are compared by the first number, and then by the second.
    """

    checkpoint: int
    steps: int
    evaluation: tuple[int, int]


class Count(NamedTuple):
    """The content of W/tries.json.

    Attributes:
      attempt: the number of the last start.
      tries: the number of starts in a row without progress, including the last start.
      best: the furthest progress before the last start.
    """

    attempt: int
    tries: int
    best: Progress


def measure_progress(workdir: pathlib.Path) -> Progress:
    """Returns how far the run in a work directory has come.

    Raises:
      StorageError: a file cannot be read.
    """
    with storage.explain(workdir, "read"):
        names = [path.name for path in (workdir / "checkpoints").glob("*")]
        metrics = workdir / "metrics.jsonl"
        evaluations = workdir / "eval"
        return Progress(
            max((int(name) for name in names if name.isdecimal()), default=-1),
            _count_workdir_lines(metrics) if metrics.is_file() else 0,
            (
                len(list(evaluations.glob("step_*.json"))),
                sum(map(_count_workdir_lines, evaluations.glob("step_*.partial.jsonl"))),
            ),
        )


def count_try(workdir: pathlib.Path, attempt: int) -> tuple[int, Progress]:
    """Counts a start of a run; every process of the run may call this function.

    Args:
      workdir: the work directory.
      attempt: how often a launcher has already started the run again; 0 begins a new count.

    Returns:
      The number of starts in a row without progress, including this start, and the progress so
      far.

    Raises:
      ValueError: W/tries.json is damaged.
      StorageError: a file cannot be read or written.
    """
    path = workdir / FILE
    now = measure_progress(workdir)
    tries, best = 1, now
    last = _read_count(path) if attempt and path.is_file() else None
    if last and attempt == last.attempt:  # another process has counted this start
        return last.tries, now
    if last and attempt > last.attempt:
        better = (
            now.checkpoint > last.best.checkpoint
            or now.steps > last.best.steps
            or now.evaluation > last.best.evaluation
        )
        tries = 1 if better else last.tries + 1
        if now.checkpoint >= last.best.checkpoint:  # a lower step means a damaged checkpoint
            steps, evaluation = max(now.steps, last.best.steps), max(now[2], last.best[2])
            best = Progress(now.checkpoint, steps, evaluation)
    _write_count(path, Count(attempt, tries, best))
    return tries, now


def _count_workdir_lines(path: pathlib.Path) -> int:
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def _read_count(path: pathlib.Path) -> Count:
    try:
        count = storage.read_object(path)
        checkpoint, steps, (complete, more) = count["best"]
        values = [count["attempt"], count["tries"], checkpoint, steps, complete, more]
        storage.check_form(values, [int], f"{path}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove this file, to count from 0 again") from error
    return Count(values[0], values[1], Progress(checkpoint, steps, (complete, more)))


def _write_count(path: pathlib.Path, count: Count) -> None:
    """Writes the count.

    All processes may write the file at the same time. Each process therefore writes a temporary
    file of its own, and renames this temporary file.
    """
    part = path.with_name(f"{FILE}.{socket.gethostname()}-{os.getpid()}{storage.PART}")
    with storage.explain(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(count._asdict()) + "\n", encoding="utf-8")
        part.replace(path)


def main(argv: list[str]) -> int:
    """Counts a start, and runs the program after `--`; returns 2 if the start is refused.

    If no program follows `--`, the function returns 0 for a start that is not refused.
    """
    own, program = argv[1:], []
    if "--" in own:
        own, program = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(prog="python -m copsd_jax.runtime.tries")
    parser.add_argument(
        "--workdir", required=True, type=storage.parse_path, help="a run's directory"
    )
    parser.add_argument("--attempt", required=True, type=int, help="number of the start, from 0")
    parser.add_argument("--limit", required=True, type=int, help="most starts without progress")
    args = parser.parse_args(own)
    try:
        tries, progress = count_try(args.workdir, args.attempt)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if tries > args.limit:
        print(
            f"error: --workdir={args.workdir}: {args.limit} starts in a row made no progress"
            f" (newest checkpoint {max(progress.checkpoint, 0)}, lines in metrics.jsonl:"
            f" {progress.steps}), so the run is not started again: read the log, then repeat the"
            " launcher's command, or set MAX_TRIES_WITHOUT_PROGRESS to a larger number",
            file=sys.stderr,
        )
        return 2
    if program:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *program])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
