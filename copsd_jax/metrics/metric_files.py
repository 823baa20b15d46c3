"""Metric files: metrics.jsonl and TensorBoard."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any


class Writer:
    """Writer of `workdir/metrics.jsonl` and `workdir/tensorboard`; only one process may hold it.

    Each line of the file is `{"step": s, name: number, ...}`. It is flushed at once, so that a
    killed run keeps its lines. A run that continues at step `resume` drops the lines of that step
    and later, which it writes again. Non-finite numbers become "nan", "inf" and "-inf", since JSON
    has none.

    Raises:
      ValueError: a line of the existing file is not JSON. A last line that a kill cut off is
        dropped.
    """

    def __init__(self, workdir: str | os.PathLike, resume: int = 0):
        self._workdir = pathlib.Path(workdir)
        self._resume = resume
        self.path = self._workdir / "metrics.jsonl"
        self._workdir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in _lines(self.path) if json.loads(line)["step"] < resume]
            part = self.path.with_suffix(".part")
            part.write_text("".join(kept), encoding="utf-8")
            os.replace(part, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line of numbers, or scalar arrays, by name."""
        numbers = {name: _as_number(value) for name, value in values.items()}
        line = {"step": int(step)}
        line |= {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        board = self._tensorboard()
        for name, number in numbers.items():
            board.add_scalar(name, number, int(step))

    def _tensorboard(self) -> Any:
        if self._board is None:
            # Imported lazily: it is slow to import, and a process that writes nothing needs none.
            import tensorboardX

            folder = str(self._workdir / "tensorboard")
            purge = self._resume or None
            self._board = tensorboardX.SummaryWriter(folder, purge_step=purge, flush_secs=10)
        return self._board

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def lines(workdir: str | os.PathLike, steps: int) -> list[str]:
    """Returns the complete lines of metrics.jsonl up to and including a step."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return [line for line in _lines(path) if json.loads(line)["step"] <= steps]


def _as_number(value: Any) -> float | int:
    return value if type(value) is int else float(value)


def _lines(path: pathlib.Path) -> list[str]:
    """Returns the complete lines of a JSONL file, without a last line that a kill cut off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
    return lines
