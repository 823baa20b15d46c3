"""Checkpoints of a run's State, written by Orbax; no other file of the package uses Orbax.

A checkpoint contains only the State. The data order and the random streams are derived from the
State's step, and the frozen base is loaded again from `model.path`.
"""

import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

NAME = "state"


def _shapes(tree: Any) -> dict[str, Any]:
    """Maps the path of each leaf to the leaf's [shape, dtype], in types that JSON supports."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)] for path, x in leaves}


class Checkpoints:
    """The checkpoints of one work directory.

    Leaving the `with` block waits until an unfinished save is complete.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 0, writer: bool = False):
        """Opens the checkpoints of a directory.

        Args:
          directory: the directory; the first save creates it.
          keep: number of newest checkpoints to keep after each save; 0 keeps all checkpoints.
          writer: whether this process may save.
        """
        self._directory = directory
        saving: Any = ocp.training.save_decision_policies
        keeping: Any = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.resolve()),
            # Orbax's default policy can skip a save silently.
            save_decision_policy=saving.FixedIntervalPolicy(1),
            preservation_policy=keeping.LatestN(keep) if keep else keeping.PreserveAll(),
            # A process that only reads must not remove files that a concurrent run is writing.
            cleanup_tmp_directories=writer,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in ascending order."""
        return sorted(item.step for item in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any) -> None:
        """Saves a state, and waits until the files are complete.

        Raises:
          RuntimeError: Orbax declined to save.
        """
        saved = self._checkpointer.save_checkpointables(
            step, {NAME: state}, custom_metadata={"shapes": _shapes(state)}
        )
        if not saved:
            raise RuntimeError(f"checkpoint {step} was not saved in {self._directory}")

    def load(self, step: int, like: Any) -> Any:
        """Loads the state of a step, with the shardings of `like` (arrays or ShapeDtypeStructs).

        Raises:
          ValueError: the step was not saved, or the saved tree differs from `like`; the message
            names one difference.
        """
        if step not in self.steps():
            raise ValueError(
                f"no checkpoint of step {step} in {self._directory}: the choices are {self.steps()}"
            )
        metadata: Any = self._checkpointer.metadata(step).custom_metadata
        saved, wanted = (
            {name: f"{dtype} {tuple(shape)}" for name, (shape, dtype) in shapes.items()}
            for shapes in (metadata["shapes"], _shapes(like))
        )
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"checkpoint {step} in {self._directory} has {name} = "
                    f"{saved.get(name, 'nothing')}, but the run needs {wanted.get(name, 'nothing')}"
                )
        return self._checkpointer.load_checkpointables(step, {NAME: like})[NAME]


def write_state(path: pathlib.Path, state: Any) -> None:
    """Writes a state to a folder of its own, which no run continues from; replaces the folder.

    All processes must call this function, because each process writes its own parts of the arrays.
    """
    ocp.save_checkpointables(str(path.resolve()), {NAME: state}, overwrite=True)


def read_state(path: pathlib.Path, like: Any) -> Any:
    """Reads the state that `write_state` wrote, with the shardings of `like`."""
    return ocp.load_checkpointables(str(path.resolve()), {NAME: like})[NAME]
