"""Bad and failed steps: writes the files of bad steps, and decides when steps stop the run.

A step is bad if its loss or its gradient is not finite, or if the logits of more than half of its
completions were not finite. A step failed if a server or a reward function gave too few usable
results for the step. Bad and failed steps do not change the weights. A failed step has no files,
because the same inputs may succeed when the step is run again.

    W/bad/step_000025.npz    inputs and results of a bad step, as the compiled step got them
    W/bad/state_000024/      the state of the last good step, which bad steps do not change

The state is written once for each streak, which is a series of consecutive bad steps. The files
of bad steps are only evidence, so no run continues from them. `python -m copsd_jax.replay` runs a
bad step again.
"""

import io
import json
import math
import pathlib
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from copsd_jax.runtime import checkpoint, failures, nonfinite, processes, storage

STREAKS = 3  # number of newest streaks whose files are kept
BATCHES = 10  # number of steps per streak for which the inputs are written


class Failure(NamedTuple):
    """The reason why a step failed.

    Attributes:
      reason: the reason, as one sentence without a period.
      refused: whether a server refused every request, which suggests that a setting is wrong.
    """

    reason: str
    refused: bool = False


class BadSteps:
    """Counts the bad and the failed steps of a run, and writes the files of the bad steps.

    All processes must call the methods with the same arguments.

    Attributes:
      streak: number of consecutive bad steps up to now.
      failed: number of consecutive failed steps up to now.
    """

    def __init__(self, directory: pathlib.Path, limit: int, written: Sequence[str] = ()):
        """Computes the initial counts from the lines in `written`.

        The last step of a run is saved even if it is bad. If train.steps is raised afterwards, the
        run continues in the middle of a streak.

        Args:
          directory: the work directory.
          limit: number of consecutive bad steps after which the run stops; the same number applies
            to consecutive failed steps. 0 means no limit.
          written: the lines of metrics.jsonl up to the step from which the run continues.
        """
        self._directory, self._limit = directory, limit
        self.streak, self.failed, self._metrics = 0, 0, {}
        self._failure: Failure | None = None
        for line in written:
            values = json.loads(line)
            self.streak = self.streak + 1 if float(values.get("bad", 0)) else 0
            self.failed = self.failed + 1 if float(values.get("failed", 0)) else 0

    def record(
        self, step: int, state: Any, inputs: Any, metrics: Mapping[str, Any],
        failure: Failure | None = None,
    ) -> None:  # fmt: skip
        """Counts a step, and writes the files of a bad step.

        Args:
          step: the number of the step, counted from 1.
          state: the state after the step; a bad step changes only the state's step number.
          inputs: the inputs of the step without the state, as a tree of NumPy arrays and None.
          metrics: the metrics of the step.
          failure: the reason why the step failed, or None if it did not fail.
        """
        self._metrics, self._failure = dict(metrics), failure
        self.failed = self.failed + 1 if failure else 0
        self.streak = self.streak + 1 if metrics["bad"] else 0
        if not 0 < self.streak <= BATCHES:
            return
        if self.streak == 1:
            processes.run_on_leader(lambda: _remove_old_streaks(self._directory / "bad", step))
            checkpoint.write_state(state_folder(self._directory, step - 1), state)
        results = {name: np.asarray(metrics[name]) for name in ("loss", "grad_norm")}
        content = {"inputs": inputs, "results": results}
        processes.run_on_leader(lambda: _write_arrays(step_file(self._directory, step), content))

    def describe(self, step: int) -> list[str]:
        """Returns the lines that describe a bad or failed step, or [] for a good step."""
        lines = [f"step {step} is skipped: {self._failure.reason}"] if self._failure else []
        if self.streak:
            kept = "so the weights stay as they were"
            lines += [f"step {step}: {self._explain()}, {kept}; {self._name_command(step)}"]
        return lines

    def refuses_save(self, step: int, last: bool) -> list[str]:
        """Returns one line with the reason why a step is not saved, or [] if the step is saved.

        Because the steps of a streak are not saved, a continued run repeats the whole streak, and
        stops at the same step. The last step of a run is saved in any case.
        """
        count, what = (self.streak, "bad") if self.streak else (self.failed, "skipped")
        if last or not count:
            return []
        which = f"the last {count} steps were" if count > 1 else "it was"
        return [f"step {step} is not saved, because {which} {what}"]

    def check(self, step: int, list_saved: Callable[[], list[int]]) -> None:
        """Checks whether the run can go on after a step.

        Raises:
          NonFinite: the state is not finite, or the streak has reached the limit. The message names
            the newest checkpoint, which was saved before the streak.
          EngineError: `limit` steps in a row have failed, or a server refused every request of the
            first step.
        """
        if self._failure and (
            0 < self._limit <= self.failed or (step == 1 and self._failure.refused)
        ):
            row = f" ({self.failed} failed steps in a row, and guards.bad_steps is {self._limit})"
            raise failures.EngineError(
                f"step {step}: {self._failure.reason}{row if self.failed > 1 else ''}"
            )
        stuck = 0 < self._limit <= self.streak
        if self._metrics["weights_finite"] and not stuck:
            return
        if stuck:
            reason = f"step {step}: {self._explain()}, and guards.bad_steps is {self._limit}"
        else:
            reason = f"the weights, optimizer or moving average are not finite after step {step}"
        saved = list_saved()
        good = "there is no checkpoint"
        if saved:
            good = f"the last good checkpoint is {self._directory / 'checkpoints' / str(saved[-1])}"
        replay = f"; {self._name_command(step)}" if 0 < self.streak <= BATCHES else ""
        raise nonfinite.NonFinite(f"{reason}; {good}{replay}")

    def _explain(self) -> str:
        loss, norm = (float(self._metrics[name]) for name in ("loss", "grad_norm"))
        what = f"the loss is {loss:.4g} and the gradient's norm {norm:.4g}"
        if math.isfinite(loss) and math.isfinite(norm):
            what = "the logits of more than half of the completions are not finite"
        return f"{what} (bad step {self.streak} in a row)" if self.streak > 1 else what

    def _name_command(self, step: int) -> str:
        if self.streak > BATCHES:
            return f"only the first {BATCHES} steps of a streak are written to W/bad"
        command = f"python -m copsd_jax.replay --workdir={self._directory} --step={step}"
        return f"to run the step again: {command}"


def step_file(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Returns the path of the inputs of a bad step."""
    return directory / "bad" / f"step_{step:06d}.npz"


def state_folder(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Returns the path of the state of the good step before a streak."""
    return directory / "bad" / f"state_{step:06d}"


def find_state(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Finds the state before a bad step: the newest state of an earlier step.

    Raises:
      FileNotFoundError: no such state exists.
    """
    numbers = [n for n in _list_numbers(directory / "bad", "state_*") if n < step]
    if not numbers:
        raise FileNotFoundError(f"{directory / 'bad'} has no state of a step before {step}")
    return state_folder(directory, numbers[-1])


def _list_numbers(folder: pathlib.Path, pattern: str) -> list[int]:
    """Lists the steps in the names of files that match the pattern, in ascending order."""
    found = (re.search(r"_(\d+)(\.npz)?$", path.name) for path in folder.glob(pattern))
    return sorted(int(match[1]) for match in found if match)


def _remove_old_streaks(folder: pathlib.Path, step: int) -> None:
    """Removes the files of the oldest streaks before a new streak begins at `step`.

    If an earlier start of the run wrote files of `step` or of later steps, these files are removed
    too.
    """
    states = _list_numbers(folder, "state_*")
    earlier = [n for n in states if n < step - 1]
    oldest = earlier[-(STREAKS - 1)] if len(earlier) >= STREAKS - 1 else 0
    for number in states:
        if number < oldest or number >= step - 1:
            shutil.rmtree(folder / f"state_{number:06d}")
    for number in _list_numbers(folder, "step_*.npz"):
        if number <= oldest or number >= step:
            (folder / f"step_{number:06d}.npz").unlink()


def _write_arrays(path: pathlib.Path, tree: Any) -> None:
    """Writes the arrays of a tree to an .npz file, each under the name of its path in the tree.

    The file gets its name only when it is complete, so a reader never sees a part of it.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    content = io.BytesIO()
    spell = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    arrays: dict[str, Any] = {spell(name): np.asarray(x) for name, x in named}
    np.savez(content, **arrays)
    with storage.explain(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_whole(path, [content.getvalue()])


def read_arrays(path: pathlib.Path, like: Any) -> Any:
    """Reads the arrays that `BadSteps` wrote; returns a tree with the structure of `like`.

    If the file has no array for a leaf of `like`, this leaf is None in the result.

    Raises:
      ValueError: the file is damaged.
    """
    spell = lambda name: jax.tree_util.keystr(name, simple=True, separator="/")  # noqa: E731
    try:
        with np.load(path) as stored:
            return jax.tree_util.tree_map_with_path(lambda name, _: stored.get(spell(name)), like)
    except (zipfile.BadZipFile, ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
