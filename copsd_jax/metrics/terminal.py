"""Progress lines, times and tables for a terminal."""

import collections
import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from rich import cells

SECONDS = 5.0  # between two lines of progress if the stream is no terminal


class Timer:
    """Timer of the parts of a loop: `with timer("rollout"): ...`; parts may nest or repeat."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the seconds of the `with` block to a part."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[part] += self._clock() - start

    def take(self) -> dict[str, float]:
        """Returns `{"seconds/rollout": 1.5, ...}` since the last call, and starts anew."""
        out = {f"seconds/{part}": seconds for part, seconds in self._seconds.items()}
        self._seconds.clear()
        return out


class Progress:
    """A progress line: updated in place on a terminal, else a new line every five seconds.

    The last state is always written.

    Args:
      label: the unit that is counted, such as "step" in "step 12/100".
      total: number of steps, prompts or the like.
      start: number of them that were done before.
      stream: standard error if None.
      clock: returns seconds.
    """

    def __init__(
        self, label: str, total: int, start: int = 0, stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._label, self._total, self._clock = label, total, clock
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        # The last (time, done, tokens so far): speeds follow the present, not the compilation.
        self._late = collections.deque([(clock(), start, 0)], maxlen=20)
        self._written, self._width, self._pending = -math.inf, 0, ""

    def update(self, done: int, tokens: int = 0, **values: float) -> None:
        """Shows that `done` of `total` are finished, with `tokens` more tokens, and the values."""
        now = self._clock()
        self._late.append((now, done, self._late[-1][2] + tokens))
        self._pending = self._line(done, values)
        if self._live:
            self._write("\r" + self._pending.ljust(self._width))
            self._width = len(self._pending)
        elif now - self._written >= SECONDS or done >= self._total:
            self._flush_line(now)

    def _flush_line(self, now: float) -> None:
        self._write(self._pending + "\n")
        self._written, self._pending = now, ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

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
            self._write("\n")
        elif self._pending:
            self._flush_line(self._clock())
        self._width, self._pending = 0, ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Formats seconds as `0:07`, `3:20` or `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Formats an aligned plain-text table: first column to the left, the others to the right.

    Widths are those of a terminal, where CJK characters take two columns.

    Raises:
      ValueError: a row has another length than the headers.
    """
    lines = [[str(cell) for cell in row] for row in (headers, *rows)]
    for row in lines:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells for {len(headers)} headers: {row}")
    widths = [max(cells.cell_len(row[i]) for row in lines) for i in range(len(headers))]
    lines.insert(1, ["-" * width for width in widths])

    def pad(index: int, cell: str) -> str:
        blanks = " " * (widths[index] - cells.cell_len(cell))
        return blanks + cell if index else cell + blanks

    return "\n".join("  ".join(itertools.starmap(pad, enumerate(row))).rstrip() for row in lines)
