"""Progress lines, timers and tables for a terminal."""

import collections
import contextlib
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from rich import cells

from copsd_jax.runtime import streams

SECONDS = 5.0  # minimum time between progress lines on a stream that is not a terminal
SILENCE = 4.0  # seconds after which an activity shows itself, and between its lines


class Timer:
    """Measures the time of loop parts: `with timer("rollout"): ...`; parts may nest or repeat."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the duration of the `with` block to the time of `part`."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[part] += self._clock() - start

    def take(self) -> dict[str, float]:
        """Returns the time of each part as `{"seconds/rollout": 1.5}`, and sets all times to 0."""
        out = {f"seconds/{part}": seconds for part, seconds in self._seconds.items()}
        self._seconds.clear()
        return out


class Activity:
    """Shows what a program is doing while it shows nothing else: "compiling the step, 12 s".

    The line appears after four seconds, and is updated every four seconds. On a terminal, it is
    updated in place, and removed in the end. On another stream, each update is a line, but after
    one minute there is only one line per minute.

    Args:
      label: what the program is doing.
      stream: the stream for the line; None for stderr.
      silence: the seconds before the first line, and between two lines.
    """

    def __init__(self, label: str, stream: TextIO | None = None, silence: float = SILENCE):
        self._label, self._silence = label, silence
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._width, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def _show(self) -> None:
        begun = written = time.monotonic()
        while not self._ended.wait(self._silence):
            now = time.monotonic()
            if not self._live and now - begun > 60 and now - written < 60:
                continue
            line = f"{self._label}, {now - begun:.0f} s"
            text = "\r" + line.ljust(self._width) if self._live else line + "\n"
            self._width, written = len(line), now
            with contextlib.suppress(OSError, ValueError):  # the stream may have been closed
                self._stream.write(text)
                self._stream.flush()

    def stop(self) -> None:
        """Ends the activity; later calls do nothing."""
        if self._thread.is_alive():
            self._ended.set()
            self._thread.join()
            if self._live and self._width:
                self._stream.write("\r" + " " * self._width + "\r")
                self._stream.flush()

    def __enter__(self) -> "Activity":
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()


class Progress:
    """A progress line, which is updated in place on a terminal.

    If the stream is not a terminal, a line is written at most every five seconds. The last
    state of the progress is always written.

    Args:
      label: the unit that is counted, such as "step" in "step 12/100".
      total: the number of units, such as steps or prompts.
      start: the number of units that are already done at the start.
      stream: the stream to write to; None for standard error.
      clock: a function that returns seconds.
    """

    def __init__(
        self, label: str, total: int, start: int = 0, stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._label, self._total, self._clock = label, total, clock
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        # The latest entries (time, units done, total tokens). Speeds are computed only from the
        # latest entries, in order to exclude compilation.
        self._late = collections.deque([(clock(), start, 0)], maxlen=20)
        self._written, self._width, self._pending = -math.inf, 0, ""

    def update(self, done: int, tokens: int = 0, **values: float) -> None:
        """Updates the line with `done` units in total, `tokens` new tokens, and `values`."""
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
        """Ends the line on a terminal; on other streams, writes a state that is not yet written."""
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
    """Formats a plain-text table; the first column is left-aligned, all others are right-aligned.

    Control characters in cells are escaped, including line breaks. Widths are measured as on a
    terminal, where CJK characters are two columns wide.

    Raises:
      ValueError: if a row has more or fewer cells than there are headers.
    """

    def spell(cell: object) -> str:
        return streams.escape_stream_text(str(cell)).replace("\n", r"\n").replace("\t", r"\t")

    lines = [[spell(cell) for cell in row] for row in (headers, *rows)]
    for row in lines:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells for {len(headers)} headers: {row}")
    widths = [max(cells.cell_len(row[i]) for row in lines) for i in range(len(headers))]
    lines.insert(1, ["-" * width for width in widths])

    def pad(index: int, cell: str) -> str:
        blanks = " " * (widths[index] - cells.cell_len(cell))
        return blanks + cell if index else cell + blanks

    return "\n".join("  ".join(itertools.starmap(pad, enumerate(row))).rstrip() for row in lines)
