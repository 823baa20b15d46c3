"""Metric files: metrics.jsonl and TensorBoard."""

import contextlib
import json
import math
import os
import pathlib
import re
import reprlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from copsd_jax.runtime import processes, storage

EVAL = "eval/"  # the names of an evaluation's scores begin with this

# The groups in which TensorBoard shows the metrics of a step. A metric is in the first group whose
# pattern it matches. A name that contains a slash is its own tag.
GROUPS = {
    "loss": re.compile(
        "loss|divergence|policy_(loss|ratio|entropy)|ratio(_clipped)?|kl_initial|clipped_mass|"
        "(grad|update)_norm|learning_rate|bad|failed|no_loss"
    ),
    "tokens": re.compile("((loss|policy|completion)_)?tokens|fill_.*|micro_batches"),
    "teacher": re.compile(
        "(divergence|advantage|reply|located|shortened)_.*|advantage|(logp|entropy)_teacher|"
        "overlap|taught|filtered|overlong_teacher_prompts|leaked|replies_cut"
    ),
    "rollout": re.compile(".*"),
}


def find_tag(name: str) -> str:
    """Returns the tag of a metric in TensorBoard, such as "loss/grad_norm"."""
    if "/" in name:
        return name
    return next(f"{group}/{name}" for group, found in GROUPS.items() if found.fullmatch(name))


class Writer:
    """Writes `workdir/metrics.jsonl` and `workdir/tensorboard`; only one process may have a writer.

    Each line of metrics.jsonl is `{"step": s, name: number, ...}`. A training step has one line,
    and so has an evaluation: `{"step": s, "eval/sw/avg@4": 0.25, ...}`. Each line is written and
    flushed to the disk immediately, so that no line is lost if the run is killed. A run that
    continues at step `resume` first drops the lines of step `resume` and later steps, because the
    run writes these lines again. Non-finite numbers are written as "nan", "inf" and "-inf", because
    JSON has no such numbers. When a writer is created, the TensorBoard file is rebuilt from the
    remaining lines of metrics.jsonl.

    Attributes:
      path: the file metrics.jsonl.
      repairs: one sentence for each defect of the existing metrics.jsonl: an incomplete last line,
        or steps without a line.

    Raises:
      ValueError: if a complete line of the existing metrics.jsonl is damaged; the message names the
        line.
      StorageError: if a file cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, resume: int = 0):
        folder = pathlib.Path(workdir)
        self.path, self.repairs = folder / "metrics.jsonl", []
        with storage.explain(folder):
            folder.mkdir(parents=True, exist_ok=True)
        kept: list[dict] = []
        if self.path.exists():
            rows, lines = _read(self.path)
            kept = [row for row in rows if row["step"] < resume]
            if torn := lines[-1]:
                self.repairs.append(
                    f"{self.path} ended in an incomplete line of {len(torn)} bytes: it is dropped"
                )
            storage.write_whole(self.path, [line + b"\n" for line in lines[: len(kept)]])
        self._last = kept[-1]["step"] if kept else -1
        self._scores = {row["step"]: row for row in kept if _is_evaluation(row)}
        trained = {row["step"] for row in kept if not _is_evaluation(row)}
        if absent := sorted(set(range(1, resume)) - trained):
            self.repairs.append(f"{self.path} has no line for {_spell_metric_steps(absent)}")
        self._file = storage.Appender(self.path)
        self._folder = folder / "tensorboard"
        rebuilt = kept or self._folder.exists()
        self._board = _rebuild_board(self._folder, kept) if rebuilt else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of a step; `values` maps names to numbers or scalar arrays."""
        self._append(_build_line(step, values))

    def _append(self, line: dict[str, Any]) -> None:
        self._file.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.sync()
        if self._board is None:
            self._board = _rebuild_board(self._folder, [])
        self._board.append(b"".join(_build_records([line])))
        self._last = line["step"]

    def write_evaluation(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the scores of an evaluation by group, as `evaluate` returns them.

        If the file has a line for an evaluation of this step, for example of fewer problems, the
        line is replaced. A run of an earlier version may have lines of later steps; the new line is
        then written before them.
        """
        values = {}
        for group, found in scores.items():
            names = {
                f"{kind}@{found['samples']}": f"{kind}_at_n" for kind in ("avg", "pass", "maj")
            }
            names |= {name: name for name in ("format_rate", "truncated", "mean_tokens")}
            values |= {f"{EVAL}{group}/{name}": found[key] for name, key in names.items()}
        line = _build_line(step, values)
        if step not in self._scores and step >= self._last:
            self._append(line)
        elif self._scores.get(step) != line:
            self._rewrite(line)
        self._scores[step] = line

    def _rewrite(self, line: dict[str, Any]) -> None:
        """Puts the line of an evaluation in its place, and rebuilds both files."""
        self.close()
        rows = [row for row in _read(self.path)[0] if row["step"] != line["step"]
                or not _is_evaluation(row)]  # fmt: skip
        rows.insert(sum(row["step"] <= line["step"] for row in rows), line)
        storage.write_whole(self.path, [f"{json.dumps(row, allow_nan=False)}\n" for row in rows])
        self._file = storage.Appender(self.path)
        self._board = _rebuild_board(self._folder, rows)

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def check_file(workdir: str | os.PathLike) -> int:
    """Checks that metrics.jsonl has no damaged line; returns the last step, or 0 for no lines.

    Raises:
      ValueError: if a complete line is damaged; the message names the line.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    try:
        rows = _read(path)[0] if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{error}: remove this line") from error
    return rows[-1]["step"] if rows else 0


def count_updates(workdir: str | os.PathLike, steps: int) -> int:
    """Returns how many of the first `steps` steps changed the weights.

    A step without a line counts as a step that changed the weights.
    """
    rows = _read_if_any(workdir)
    idle = [row for row in rows if row["step"] <= steps and (row.get("bad") or row.get("no_loss"))]
    return steps - len(idle)


def count_failed_metric_steps(workdir: str | os.PathLike, steps: int) -> int:
    """Returns how many of the first `steps` steps were skipped because they failed."""
    rows = _read_if_any(workdir)
    return sum(row["step"] <= steps and float(row.get("failed", 0)) > 0 for row in rows)


def read_metric_lines(workdir: str | os.PathLike, steps: int) -> list[str]:
    """Returns the training steps' lines in metrics.jsonl, up to and including step `steps`.

    If a killed run left an incomplete last line, that line is not returned.

    Raises:
      StorageError: if there is no metrics.jsonl.
      ValueError: if a complete line is damaged; the message names the line.
    """
    rows, lines = _read(pathlib.Path(workdir) / "metrics.jsonl")
    return [
        line.decode() + "\n"
        for row, line in zip(rows, lines, strict=False)
        if row["step"] <= steps and not _is_evaluation(row)
    ]


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith(EVAL) for name in row)


def _read_if_any(workdir: str | os.PathLike) -> list[dict]:
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return _read(path)[0] if path.exists() else []


def _read(path: pathlib.Path) -> tuple[list[dict], list[bytes]]:
    """Returns the rows and the lines of metrics.jsonl, as `storage.read_lines` does."""
    rows, lines = storage.read_lines(path, {"step": int})
    storage.check_stored_step_order(path, rows, strict=False)
    seen: set[tuple[int, bool]] = set()
    for number, row in enumerate(rows, 1):
        if (kind := (row["step"], _is_evaluation(row))) in seen:
            raise ValueError(f"{path} line {number} is the second line of step {row['step']}")
        seen.add(kind)
        for name, value in row.items():
            small = type(value) is float or (type(value) is int and abs(value) < 2**63)
            if not small and value not in ("nan", "inf", "-inf"):
                shown = reprlib.repr(value)
                raise ValueError(f"{path} line {number} has {name} = {shown}: it must be a number")
    return rows, lines


def _spell_metric_steps(steps: list[int]) -> str:
    """Returns ascending steps as words: "steps 1 to 3, 7"."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and step == ranges[-1][-1] + 1:
            ranges[-1][1:] = [step]
        else:
            ranges.append([step])
    return "steps " + ", ".join(" to ".join(map(str, part)) for part in ranges)


# ---- TensorBoard -----------------------------------------------------------------------------


def _rebuild_board(folder: pathlib.Path, rows: list[dict]) -> storage.Appender:
    """Writes a new event file with the given rows, then removes the run's older event files.

    At any moment, the folder contains every step that was written. If the run is killed before the
    older files are removed, the next start writes another new file, and then removes all others.
    """
    with storage.explain(folder):
        folder.mkdir(exist_ok=True)
        older = [path for path in folder.iterdir() if "tfevents" in path.name]
    path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
    storage.write_whole(path, _build_records([{}, *rows]))
    for file in older:
        storage.remove(file)
    return storage.Appender(path)


def _build_event(line: Mapping[str, Any]) -> bytes:
    """Serializes a line of metrics.jsonl as an Event; {} gives the first Event of a file."""
    # tensorboardX is imported lazily: the import is slow, and some processes write nothing.
    from tensorboardX.proto import event_pb2, summary_pb2

    events: Any = event_pb2  # the classes of both modules are unknown to type checkers
    summaries: Any = summary_pb2
    event = events.Event(wall_time=time.time())
    if line:
        event.step = line["step"]
        event.summary.value.extend(
            summaries.Summary.Value(tag=find_tag(name), simple_value=float(number))
            for name, number in line.items()
            if name != "step"
        )
    else:
        event.file_version = "brain.Event:2"
    return event.SerializeToString()


def _build_records(lines: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    """Yields each line as a TFRecord: length, checksum of length, Event, checksum of Event."""
    for start in range(0, len(lines), 1024):
        events = [_build_event(line) for line in lines[start : start + 1024]]
        sizes = [struct.pack("<Q", len(event)) for event in events]
        checks = zip(_compute_checksums(sizes), _compute_checksums(events), strict=True)
        for size, event, (first, second) in zip(sizes, events, checks, strict=True):
            yield size + first + event + second


def _compute_checksums(texts: Sequence[bytes]) -> list[bytes]:
    """Returns the masked CRC-32C of each text, which is the checksum in a TFRecord.

    Fewer than 16 texts are left to tensorboardX. Sixteen or more texts are processed together, byte
    by byte. This is ten times as fast as tensorboardX.
    """
    from tensorboardX import crc32c, record_writer

    if len(texts) < 16:
        return [struct.pack("<I", record_writer.masked_crc32c(text)) for text in texts]
    table = np.array(crc32c.CRC_TABLE, np.uint32)
    sizes = np.array([len(text) for text in texts])
    longest = max(sizes)
    bytes_BN = np.frombuffer(b"".join(text.ljust(longest, b"\0") for text in texts), np.uint8)
    bytes_NB = bytes_BN.reshape(len(texts), longest).T.copy()
    crc_B = np.full(len(texts), 0xFFFFFFFF, np.uint32)
    for n in range(longest):
        step_B = table[(crc_B ^ bytes_NB[n]) & 0xFF] ^ (crc_B >> 8)
        crc_B = np.where(n < sizes, step_B, crc_B)
    crc_B = ~crc_B
    masked_B = (crc_B >> 15 | crc_B << 17) + np.uint32(0xA282EAD8)
    return [struct.pack("<I", value) for value in masked_B]


def _build_line(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a line; values that JSON lacks are spelled as text."""
    numbers = {name: v if type(v) is int else float(v) for name, v in values.items()}
    return {"step": int(step)} | {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}


class NoWriter:
    """Stands for the `Writer` in processes that write nothing."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes nothing; see `Writer.write`."""

    def write_evaluation(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Writes nothing; see `Writer.write_evaluation`."""


@contextlib.contextmanager
def open_metric_writer(directory: pathlib.Path, first: int) -> Iterator[Writer | NoWriter]:
    """Yields a writer of metrics for a run that continues after step `first`.

    Only the leading process writes.
    """
    if not processes.is_leader():
        yield NoWriter()
        return
    with Writer(directory, resume=first + 1) as writer:
        for repair in writer.repairs:
            print(repair, flush=True)
        yield writer
