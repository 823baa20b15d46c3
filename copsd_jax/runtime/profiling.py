"""A trace of some training steps, for xprof and Perfetto."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax


class StepTrace:
    """Records the time of every operation during some training steps.

    Args:
      steps: the first and the last step, such as "3:5"; "" for no trace. A run that continues
        within these steps records the steps that are left.
      folder: the folder for the trace.
    """

    def __init__(self, steps: str, folder: pathlib.Path):
        first, _, last = steps.partition(":")
        self._steps = range(int(first), int(last) + 1) if steps else range(0)
        self._folder, self._open = folder, False

    @contextlib.contextmanager
    def record(self, number: int) -> Iterator[None]:
        """Records the `with` block if the step with this number is one of the steps to record."""
        if number not in self._steps:
            yield
            return
        if not self._open:
            jax.profiler.start_trace(self._folder)
            self._open = True
        ended = True
        try:
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                yield
            ended = number == self._steps[-1]
        finally:
            if ended:  # after the last of the steps, or after an error
                jax.profiler.stop_trace()
                self._open = False
