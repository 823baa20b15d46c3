"""Output that may lose its reader: a closed pipe must not stop a run.

With `2>&1 | tee log`, Ctrl-C ends `tee` too. Without a reader, every write raises BrokenPipeError,
and the run would end before it saves. This module does not import JAX.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def write_error(text: str) -> None:
    """Writes a text to stderr from the handler of a signal; ignores errors."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def join_lines(error: BaseException) -> str:
    """Returns the message of an error on one line."""
    return " ".join(str(error).splitlines())


class _Output:
    """A text stream that drops its output after the pipe behind it has lost its reader."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Opens the null device in place of the pipe.

        The stream keeps the text that it could not write. A stream that only ignored the error
        would fail again at the exit of the program, and change the exit code to 120.
        """
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        self._stream.flush()


@contextlib.contextmanager
def ignore_closed_pipes() -> Iterator[None]:
    """Drops the output to stdout and stderr within the block once their pipe has no reader."""
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Output, former)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = former
