"""Checkpoints of a run's State through Orbax; nothing else in the project knows Orbax.

A checkpoint is the State alone: data order and random streams follow from its step, and the frozen
base comes from `model.path` again.
"""

import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

NAME = "state"


def _checkpointer(directory: pathlib.Path, keep: int, writer: bool) -> ocp.training.Checkpointer:
    """One that saves whenever asked (the default policies skip silently), and keeps the latest."""
    policies: Any = ocp.training.save_decision_policies
    keeping: Any = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        str(directory.resolve()),
        save_decision_policy=policies.FixedIntervalPolicy(1),
        preservation_policy=(keeping.LatestN(keep) if keep else keeping.PreserveAll()),
        # A reader must not remove what a run beside it is writing.
        cleanup_tmp_directories=writer,
    )


def _shapes(tree: Any) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): (tuple(x.shape), str(x.dtype)) for path, x in leaves}


class Checkpoints:
    """The checkpoints of one work directory. Closing waits for a save under way."""

    def __init__(self, directory: pathlib.Path, keep: int = 0, writer: bool = False):
        """`keep` newest ones survive a save, 0 keeps all; only a `writer` may save."""
        self._checkpointer = _checkpointer(directory, keep, writer)
        self._directory = directory

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def steps(self) -> list[int]:
        """Steps that can be loaded, ascending. A save that was cut off is not among them."""
        return sorted(item.step for item in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any) -> None:
        """Saves and waits until the files are whole.

        Raises:
          RuntimeError: if Orbax declined to save.
        """
        shapes: Any = {
            name: [list(shape), dtype] for name, (shape, dtype) in _shapes(state).items()
        }
        saved = self._checkpointer.save_checkpointables(
            step, {NAME: state}, custom_metadata={"shapes": shapes}
        )
        if not saved:
            raise RuntimeError(f"checkpoint {step} was not saved in {self._directory}")

    def load(self, step: int, like: Any) -> Any:
        """The State of a step, with the shardings of `like` (arrays or ShapeDtypeStructs).

        Raises:
          ValueError: if the saved tree is another one, with the first difference.
        """
        if step not in self.steps():
            raise ValueError(f"no checkpoint of step {step} in {self._directory}: {self.steps()}")
        metadata: Any = self._checkpointer.metadata(step).custom_metadata
        saved = {k: (tuple(v[0]), v[1]) for k, v in metadata["shapes"].items()}
        wanted = _shapes(like)
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"checkpoint {step} in {self._directory} holds {name} = "
                    f"{saved.get(name, 'nothing')}, this run needs {wanted.get(name, 'nothing')}"
                )
        return self._checkpointer.load_checkpointables(step, {NAME: like})[NAME]
