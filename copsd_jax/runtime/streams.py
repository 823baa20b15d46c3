"""Output: text that is safe for a terminal, and pipes that may lose their reader.

A closed pipe must not stop a run. With `2>&1 | tee log`, Ctrl-C ends `tee` too. Without a reader,
every write raises BrokenPipeError, and the run would end before it saves. This module does not
import JAX.
"""

import contextlib
import os
import re
import sys
import unicodedata
from typing import Any

# Invisible characters that change the order of the text around them, or hide text in it.
_HIDDEN = re.compile("[\u202a-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]")


def escape_stream_text(text: str) -> str:
    r"""Returns a text in which control characters are spelled, such as `\x1b` for an escape.

    Control characters in a text of a model or of a data file could move the cursor, change colours
    or the window's title, overwrite earlier lines, or show characters in another order. Line breaks
    and tabs are kept.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") and char not in "\n\t")
        or _HIDDEN.match(char)
        else char
        for char in text
    )


def spell_error(error: BaseException) -> str:
    """Returns the message of an error on one line, without control characters and hub tokens.

    Messages of other libraries may contain the headers of a request, and with them a token of the
    Hugging Face hub. For an error of the operating system, the result is the name of the file and
    the reason, without a prefix such as "[Errno 36]".
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    text = escape_stream_text(" ".join(text.splitlines()))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        for part in os.environ.get(name, "").split():
            text = text.replace(part, f"[{name}]") if len(part) >= 8 else text
    return text


def write_error(text: str) -> None:
    """Writes a text to stderr from the handler of a signal; ignores errors."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class _OutputStream:
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


def ignore_closed_pipes() -> None:
    """Makes stdout and stderr drop their output after their pipe has lost its reader."""
    sys.stdout, sys.stderr = _OutputStream(sys.stdout), _OutputStream(sys.stderr)


def warn(text: str) -> None:
    """Prints a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
