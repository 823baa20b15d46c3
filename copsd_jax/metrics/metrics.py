"""Numbers of a run: means, scores with intervals, and where they go (files, terminal)."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np
from rich import cells

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point
RESAMPLES = 10_000


# ---- means and statistics --------------------------------------------------------------------


class Mean(NamedTuple):
    """A weighted mean as (sum, count), so that parts of unequal size merge exactly.

    Holds Python numbers or arrays; as a tuple it passes through jit and psum as it is.
    """

    total: Any = 0.0
    count: Any = 0.0

    def merge(self, other: "Mean") -> "Mean":
        """The mean of both parts together."""
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """The mean on the host; nan of nothing."""
        count = float(self.count)
        return float(self.total) / count if count else math.nan


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean of per-problem scores with its 95 % interval.

    Args:
      values: one score in [0, 1] per problem, the mean over the problem's samples: samples of one
        problem are alike, so the problem is the unit.

    Wilson's interval (1927) with n = mean (1 - mean) / (variance / problems), which is the number
    of problems where scores are 0 or 1 and more where each is a mean of several samples. Unlike
    mean +- 1.96 errors it stays in [0, 1] and has a width at 0 and at 1.

    Raises:
      ValueError: without values, or for a value outside [0, 1].
    """
    scores = _shares(values)
    mean, variance = float(scores.mean()), float(scores.var())
    n = len(scores)
    size = n * mean * (1 - mean) / variance if variance > 0 else float(n)
    centre = (mean + Z95**2 / (2 * size)) / (1 + Z95**2 / size)
    half = Z95 / (1 + Z95**2 / size)
    half *= math.sqrt(mean * (1 - mean) / size + Z95**2 / (4 * size**2))
    return mean, max(0.0, centre - half), min(1.0, centre + half)


class Paired(NamedTuple):
    """After minus before, its 95 % interval, and the p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def paired(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Paired:
    """Compares two scores of the same problems, in the same order.

    Args:
      before, after: one score in [0, 1] per problem; several samples or several seeds of a problem
        are averaged first, since the problem is what is drawn.
      seed: of the resamples.

    The interval is the percentile bootstrap over problems (10,000 resamples of the differences).
    p is the exact two-sided sign test on the problems that changed, which for scores of 0 and 1 is
    McNemar's exact test.

    Raises:
      ValueError: for unequal numbers of problems, none, or a value outside [0, 1].
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before and {len(after)} after do not pair")
    differences = _shares(after) - _shares(before)
    n = len(differences)
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // n)  # at a time, to bound the memory
    means = []
    for start in range(0, RESAMPLES, rows):
        draw = rng.integers(n, size=(min(rows, RESAMPLES - start), n))
        means.append(differences[draw].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    return Paired(float(differences.mean()), float(low), float(high), sign_test(up, down))


def sign_test(up: int, down: int) -> float:
    """Exact two-sided p-value of `up` and `down` under equal odds."""
    n = up + down
    tail = sum(math.comb(n, k) for k in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2**n)


def _shares(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"one score per problem is needed, not an array of shape {array.shape}")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"scores lie in [0, 1], not in [{array.min()}, {array.max()}]")
    return array


# ---- scores ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
    """One graded completion: `answer`, `correct`, `status` of its Grade, and its length."""

    answer: str | None
    correct: bool
    status: str
    tokens: int
    truncated: bool  # ended by the limit of tokens, not by a stop


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that k of n samples, c of them correct, hold a correct one (Chen et al. 2021,
    equation 1): 1 - C(n - c, k) / C(n, k)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def avg_at_n(correct: Sequence[bool]) -> float:
    """Share of correct samples of one problem."""
    return sum(map(bool, correct)) / len(correct)


def maj_at_n(classes: Sequence[int], correct: Sequence[bool]) -> float:
    """1 if the largest class of equal answers is correct, else 0; ties go to the first seen.

    Args:
      classes: of each sample, as `graders.Grader.same_class` gives them; -1 has no vote.
      correct: of each sample; a class is graded by its first member.
    """
    votes = collections.Counter(k for k in classes if k >= 0)
    if not votes:
        return 0.0
    winner = max(votes, key=lambda k: votes[k])  # the first of equals: a Counter keeps the order
    return float(correct[list(classes).index(winner)])


def score(
    problems: Sequence[Sequence[Sample]],
    same_class: Callable[[Sequence[str | None]], list[int]],
    unresolved: Sequence[str],
) -> dict[str, float]:
    """The scores of one group of problems, such as those of one language.

    Args:
      problems: the n samples of each problem; n is the same for all.
      same_class: `graders.Grader.same_class`.
      unresolved: the statuses that mean "no decision": `graders.UNRESOLVED`.

    Returns:
      `problems`, `samples` (n), `avg_at_n` with its interval `low`, `high`, `pass_at_n`,
      `pass_at_2`, `pass_at_4` ... for powers of two below n, `maj_at_n`, `format_rate`, `truncated`
      and `unresolved` (shares of samples), `mean_tokens`.

    Raises:
      ValueError: without problems, or for unequal numbers of samples.
    """
    sizes = {len(samples) for samples in problems}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"each problem needs the same number of samples, not {sorted(sizes)}")
    n = sizes.pop()
    correct = [[sample.correct for sample in samples] for samples in problems]
    every = [sample for samples in problems for sample in samples]
    average, low, high = interval([avg_at_n(row) for row in correct])
    out = {"problems": len(problems), "samples": n, "avg_at_n": average, "low": low, "high": high}
    names = {f"pass_at_{2**i}": 2**i for i in range(1, n.bit_length()) if 2**i < n}
    for name, k in {**names, "pass_at_n": n}.items():
        out[name] = float(np.mean([pass_at_k(n, sum(row), k) for row in correct]))
    votes = [same_class([sample.answer for sample in samples]) for samples in problems]
    out["maj_at_n"] = float(np.mean([maj_at_n(v, c) for v, c in zip(votes, correct, strict=True)]))
    out["format_rate"] = float(np.mean([sample.answer is not None for sample in every]))
    out["truncated"] = float(np.mean([sample.truncated for sample in every]))
    out["unresolved"] = float(np.mean([sample.status in unresolved for sample in every]))
    out["mean_tokens"] = float(np.mean([sample.tokens for sample in every]))
    return out


# ---- where numbers go ------------------------------------------------------------------------


class Writer:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard`; only one process may hold it.

    Each line of the file is `{"step": s, name: number, ...}`, written through at once, so that a
    killed run keeps what it reported. A run that continues at step `resume` drops the lines of
    that step and later: it will write them again. Non-finite numbers are written as "nan", "inf",
    "-inf", since JSON has none.

    Raises:
      ValueError: for a line that is not JSON, unless it is the last one, cut off by a kill.
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
        """One line. `values`: numbers, 0-d arrays or `Mean`s by name."""
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
            import tensorboardX  # slow to import, and not needed by who only reads scores

            folder = str(self._workdir / "tensorboard")
            purge = self._resume or None
            self._board = tensorboardX.SummaryWriter(folder, purge_step=purge, flush_secs=10)
        return self._board

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def lines(workdir: str | os.PathLike, steps: int) -> list[str]:
    """The whole lines of metrics.jsonl up to a step, that one included."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return [line for line in _lines(path) if json.loads(line)["step"] <= steps]


def _as_number(value: Any) -> float | int:
    if isinstance(value, Mean):
        return value.value()
    return value if type(value) is int else float(value)


def _lines(path: pathlib.Path) -> list[str]:
    """Whole lines of a JSONL file, without a last one that a kill cut off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from error
    return lines


class Timer:
    """Seconds by part of the loop: `with timer("rollout"): ...`; parts may nest or repeat."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[part] += self._clock() - start

    def take(self) -> dict[str, float]:
        """`{"seconds/rollout": 1.5, ...}` since the last call, and starts anew."""
        out = {f"seconds/{part}": seconds for part, seconds in self._seconds.items()}
        self._seconds.clear()
        return out


class Progress:
    """A line on the state of long work: live on a terminal, else a new one every few seconds.

    Args:
      label: what is counted, as in "step 12/100".
      total: of steps, prompts ...; `start` of them were done before.
      seconds: between lines where the stream is no terminal; the last state is always written.
    """

    def __init__(
        self,
        label: str,
        total: int,
        start: int = 0,
        stream: TextIO | None = None,
        seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._label, self._total, self._seconds = label, total, seconds
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._clock = clock
        # (time, done, tokens so far) of late: speeds follow the present, not the compilation.
        self._late = collections.deque([(clock(), start, 0)], maxlen=20)
        self._written = -math.inf
        self._width = 0
        self._pending = ""

    def update(self, done: int, tokens: int = 0, **values: float) -> None:
        """`done` of `total` are finished, `tokens` more since the last call; values are shown."""
        now = self._clock()
        self._late.append((now, done, self._late[-1][2] + tokens))
        self._pending = self._line(done, values)
        if self._live:
            self._stream.write("\r" + self._pending.ljust(self._width))
            self._stream.flush()
            self._width = len(self._pending)
        elif now - self._written >= self._seconds or done >= self._total:
            self._flush_line(now)

    def _flush_line(self, now: float) -> None:
        self._stream.write(self._pending + "\n")
        self._stream.flush()
        self._written, self._pending = now, ""

    def _line(self, done: int, values: Mapping[str, float]) -> str:
        (first, done_then, tokens_then), (last, _, tokens) = self._late[0], self._late[-1]
        parts = [f"{self._label} {done}/{self._total}"]
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        if tokens > tokens_then and last > first:
            parts.append(f"{(tokens - tokens_then) / (last - first):,.0f} tokens/s")
        if done > done_then and last > first and done < self._total:
            left = (self._total - done) * (last - first) / (done - done_then)
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def close(self) -> None:
        """Ends the live line, or writes a last state not yet written."""
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
        elif self._pending:
            self._flush_line(self._clock())
        self._width, self._pending = 0, ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """`0:07`, `3:20`, `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned plain text: the first column to the left, the others to the right.

    Widths are a terminal's (CJK characters take two columns).

    Raises:
      ValueError: for a row of another length than the headers.
    """
    lines = [[str(cell) for cell in row] for row in (headers, *rows)]
    for row in lines:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells for {len(headers)} headers: {row}")
    widths = [max(cells.cell_len(row[i]) for row in lines) for i in range(len(headers))]
    lines.insert(1, ["-" * width for width in widths])
    text = []
    for row in lines:
        padded = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blanks = " " * (width - cells.cell_len(cell))
            padded.append(blanks + cell if index else cell + blanks)
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)
