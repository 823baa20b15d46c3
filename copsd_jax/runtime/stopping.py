"""The points at which a run obeys a signal that asks it to stop.

Launchers and clouds send SIGTERM, and Ctrl-C sends SIGINT. Before training begins, a signal ends
the process at once, because there is nothing to save (`signals.end_at_once`). During training, the
first signal stops the training loop after the current step, or at once if the step would take too
long. A second signal always ends the process at once.
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator

import jax

from copsd_jax.runtime import processes, signals, streams


class StopRequest:
    """The request of a signal to stop a run.

    All processes must call every method except `listen`, in the same order, because the processes
    exchange their requests in these methods.
    """

    def __init__(self) -> None:
        self._number = 0  # number of the signal; 0 if no signal has arrived
        self._deadline = math.inf  # time at which the sender may kill the process
        self._end: float | None = None  # expected end of the work that a stop may abandon
        self._reserve = 0.0  # seconds that a save takes after the work

    @contextlib.contextmanager
    def listen(self, grace: float) -> Iterator[None]:
        """Handles signals within the block: notes the first, and ends the process at the second.

        Args:
          grace: seconds between the signal and the time at which its sender kills the process.
        """

        def note(number: int, _: object) -> None:
            if self._number:
                os._exit(128 + number)
            self._number, self._deadline = number, time.monotonic() + grace
            leaves = self._must_leave()
            if processes.is_leader():
                what = "stopping now" if leaves else "stopping after the work at hand"
                again = "a second signal ends the process at once"
                streams.write_error(f"\n{signal.Signals(number).name}: {what}; {again}\n")
            # One of several processes must not end alone: all other processes would wait for it.
            if leaves and jax.process_count() == 1:
                raise signals.Stopped(number)

        with signals.handle_signals(note):
            yield

    def _must_leave(self) -> bool:
        if not self._number or self._end is None:
            return False
        # If the work takes longer than expected, the earliest possible end is now.
        return max(self._end, time.monotonic()) + self._reserve > self._deadline

    @contextlib.contextmanager
    def leave_if_late(self, end: float, reserve: float = 0.0) -> Iterator[None]:
        """Ends the work in the block at a signal, if the work would end after the deadline.

        Args:
          end: the time, by the clock `time.monotonic`, at which the work is expected to be
            complete. If the time is not known, use infinity.
          reserve: seconds that a save takes after the work.

        Raises:
          signals.Stopped: a signal has arrived, and the work would be complete too late. A single
            process raises this error as soon as the signal arrives. Several processes raise it only
            in `poll`.
        """
        self._end, self._reserve = end, reserve
        try:
            self.poll()
            yield
        finally:
            self._end = None

    def poll(self) -> None:
        """Raises Stopped if the current work must be abandoned; see `leave_if_late`."""
        self._obey(self._number if self._must_leave() else 0)

    def obey(self) -> None:
        """Raises Stopped if any process has received a signal."""
        self._obey(self._number)

    def _obey(self, number: int) -> None:
        if number := processes.agree_on_largest(number):
            raise signals.Stopped(number)
