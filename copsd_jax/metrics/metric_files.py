"""Metric files: metrics.jsonl and TensorBoard."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any


class Writer:
    """Writes `workdir/metrics.jsonl` and `workdir/tensorboard`; only one process may have a writer.

    Each line of metrics.jsonl is `{"step": s, name: number, ...}`. Each line is flushed at once, so
    that no line is lost if the run is killed. A run that continues at step `resume` first drops the
    lines of step `resume` and later steps, because the run writes these lines again. Non-finite
    numbers are written as "nan", "inf" and "-inf", because JSON has no such numbers.

    Raises:
      ValueError: if a complete line of the existing metrics.jsonl is not JSON. An incomplete last
        line, which a killed run may leave, raises no error and is dropped.
    """

    def __init__(self, workdir: str | os.PathLike, resume: int = 0):
        self._workdir = pathlib.Path(workdir)
        self._resume = resume
        self.path = self._workdir / "metrics.jsonl"
        self._workdir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            part = self.path.with_suffix(".part")
            part.write_text("".join(read_metric_lines(workdir, resume - 1)), encoding="utf-8")
            os.replace(part, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of a step; `values` maps names to numbers or scalar arrays."""
        numbers = {name: v if type(v) is int else float(v) for name, v in values.items()}
        line = {"step": int(step)}
        line |= {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is None:
            # tensorboardX is imported lazily: the import is slow, and some processes write nothing.
            import tensorboardX

            folder, purge = str(self._workdir / "tensorboard"), self._resume or None
            self._board = tensorboardX.SummaryWriter(folder, purge_step=purge, flush_secs=10)
        for name, number in numbers.items():
            self._board.add_scalar(name, number, int(step))

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def read_metric_lines(workdir: str | os.PathLike, steps: int) -> list[str]:
    """Returns the lines of metrics.jsonl for the steps up to and including `steps`.

    If a killed run left an incomplete last line, that line is not returned.

    Raises:
      FileNotFoundError: if there is no metrics.jsonl.
      ValueError: if a complete line is not JSON.
    """
    path, kept = pathlib.Path(workdir) / "metrics.jsonl", []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= steps:
                kept.append(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
    return kept
