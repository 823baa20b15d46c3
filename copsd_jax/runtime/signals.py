"""Handlers of signals that ask a process to stop; this module does not import JAX."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from copsd_jax.runtime import streams

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal has asked the run to stop, and the current work must be abandoned.

    The base class is BaseException, as for KeyboardInterrupt. Therefore no `except Exception` in a
    reward function or in a retry catches this exception.

    Attributes:
      signal: the signal that has arrived.
    """

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """Returns the exit code by which shells report this signal: 130 or 143."""
        return 128 + self.signal


def end_at_once() -> None:
    """Sets signal handlers that end the process with a message, but without any clean-up.

    No exception is raised, because an exception inside a callback of JAX could be lost.
    """

    def end(number: int, _: object) -> None:
        again = "to start again or to continue, repeat the command"
        streams.write_error(f"\nstopped by {signal.Signals(number).name}: {again}\n")
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, end)


@contextlib.contextmanager
def handle_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Sets the handler of SIGTERM and SIGINT; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals only in the main thread
        return
    former = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in former.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)
