"""Checkpoints of a run's State, written by Orbax; no other file of the package uses Orbax.

A checkpoint contains only the State. The data order and the random streams are derived from the
State's step, and the frozen base is loaded again from `model.path`.

A save is written to `<step>.part` while training goes on. When all its files are on the disk, the
folder gets a manifest with the checksum of each file, and the name `<step>`. A checkpoint is whole
if it agrees with its manifest. Checkpoints of earlier versions have no manifest, and are loaded
without this check.
"""

import contextlib
import errno
import logging
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from copsd_jax.runtime import manifest, processes, storage

NAME = "state"
# A checkpoint whose metadata has this entry must have a manifest. Checkpoints of earlier versions
# have neither this entry nor a manifest.
_MARK = "manifest"


class UnusableCheckpoint(ValueError):
    """An error that says in one sentence why a checkpoint cannot be loaded."""


class DamagedCheckpoint(UnusableCheckpoint):
    """An error that says why a checkpoint is not whole; callers may append a remark."""


@contextlib.contextmanager
def _silence_orbax() -> Iterator[None]:
    """Drops Orbax's log messages within the block.

    If the disk fails, Orbax logs the error three times, in 300 lines, and also raises the error.
    """

    def is_foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in pathlib.Path(record.pathname).parts

    log = logging.getLogger("absl")
    log.addFilter(is_foreign)
    try:
        yield
    finally:
        log.removeFilter(is_foreign)


def _shapes(tree: Any) -> dict[str, Any]:
    """Maps the path of each leaf to the leaf's [shape, dtype], in types that JSON supports."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)] for path, x in leaves}


def _first_line(error: BaseException) -> str:
    """Returns a short reason for an error of Orbax, whose messages can have hundreds of lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "No space left on device" in str(error):
        return "No space left on device"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _find_disk_error(error: BaseException) -> str:
    """Returns the disk's error text in an error of Orbax; "" if the disk is not the cause."""
    numbers = (*storage.DISK_ERRORS, errno.EACCES, errno.EPERM)
    return next((text for text in map(os.strerror, numbers) if text in str(error)), "")


def _raise_if_unreadable(folder: pathlib.Path, error: Exception) -> None:
    """Raises a StorageError if Orbax's error means that the disk failed or refused access.

    For some files, Orbax gives the disk's error only in the text of an error of its own.
    """
    if reason := _find_disk_error(error):
        raise storage.StorageError(f"{folder} cannot be read ({reason})") from error


def _read_added_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the entries that `save` added to the metadata of a checkpoint."""
    metadata: Any = ocp.checkpointables_metadata(str(folder.resolve()))
    return dict(metadata.custom_metadata or {})


def _compare_shapes(folder: pathlib.Path, prefix: str, like: Any) -> None:
    """Checks that the saved leaves whose names begin with `prefix` have the shapes of `like`."""
    added, new = _read_added_metadata(folder), _shapes(like)
    if "shapes" not in added:
        return  # an earlier version wrote this state to W/bad; `_load` checks the shapes
    old = added["shapes"]
    old = {name: shape for name, shape in old.items() if name.startswith(prefix)}
    saved, wanted = (
        {name: f"{dtype} {tuple(shape)}" for name, (shape, dtype) in shapes.items()}
        for shapes in (old, {prefix + name: shape for name, shape in new.items()})
    )
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise UnusableCheckpoint(
                f"checkpoint {folder.name} in {folder.parent} has {name} = "
                f"{saved.get(name, 'nothing')}, but the run needs {wanted.get(name, 'nothing')}"
            )


def _find_damage(folder: pathlib.Path) -> str:
    """Returns why this process's share of a checkpoint is damaged, or "" if it is whole."""
    with storage.explain(folder, "read"):
        if not any(folder.iterdir()):
            return "the folder is empty"
        if (folder / manifest.NAME).exists():
            share, shares = jax.process_index(), jax.process_count()
            return manifest.find_damage(folder, share, shares)
    try:
        added = _read_added_metadata(folder)
    except Exception as error:  # Orbax has many errors for a file that it cannot parse
        _raise_if_unreadable(folder, error)
        return f"its metadata cannot be read: {_first_line(error)}"
    return f"its {manifest.NAME} is missing" if _MARK in added else ""


def _raise_if_damaged(folder: pathlib.Path, reason: str) -> None:
    """Raises DamagedCheckpoint on all processes if any process has a reason."""
    if reason := next(filter(None, processes.gather_texts(reason)), ""):
        raise DamagedCheckpoint(
            f"checkpoint {folder.name} in {folder.parent} is damaged ({reason})"
        )


def _load(folder: pathlib.Path, like: dict[str, Any]) -> dict[str, Any]:
    state, reason = {}, ""
    # A folder with a manifest has already been compared with the manifest, so damage cannot be the
    # cause of an error here.
    whole = processes.run_on_leader((folder / manifest.NAME).exists)
    try:
        state = ocp.load_checkpointables(str(folder.resolve()), like)
    except MemoryError:
        raise
    except Exception as error:
        _raise_if_unreadable(folder, error)
        if whole or "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = f"it cannot be loaded: {_first_line(error)}"
    if not whole:  # perhaps only one of the processes reads the damaged file
        _raise_if_damaged(folder, reason)
    return state


class Checkpoints:
    """The checkpoints of one work directory.

    All processes call the same methods in the same order. `save_seconds` is the duration of the
    last complete save. Only the leading process writes manifests, and renames and removes folders.
    Leaving the `with` block waits until an unfinished save is complete.
    """

    def __init__(
        self, directory: pathlib.Path, keep: int = 0, writer: bool = False, minutes: float = 0
    ):
        """Opens the checkpoints of a directory.

        Args:
          directory: the directory; a writer creates it.
          keep: number of newest checkpoints to keep after each save; 0 keeps all checkpoints.
          writer: whether this process may save. A writer removes the leftovers of unfinished saves.
          minutes: number of minutes from one save until the next is due; 0 means never.

        Raises:
          StorageError: the directory cannot be created or cleaned.
        """
        self._directory, self._keep, self._writer = directory, keep, writer
        self._minutes, self._saved_at = minutes, time.monotonic()
        self._last: int | None = None  # the step that this process saved or loaded last
        self._thread: threading.Thread | None = None
        self._failure = ""  # the message of a background save that failed
        self.save_seconds = 0.0  # duration of the last complete save
        if writer:
            processes.run_on_leader(self._clean)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            # After an error, other processes may not reach this line, so this process waits alone.
            self._thread.join()
            if self._failure:
                print(f"error: {self._failure}", file=sys.stderr)

    def steps(self) -> list[int]:
        """Returns the steps of all saved checkpoints, whole or damaged, in ascending order."""
        if not self._directory.is_dir():
            return []
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())

    # ------------------------------------------------------------------------------------ saving

    def is_due(self) -> bool:
        """Returns whether `minutes` have passed since the last save, by the leader's clock."""
        if not self._minutes:
            return False
        return processes.run_on_leader(
            lambda: time.monotonic() - self._saved_at >= self._minutes * 60
        )

    def save(self, step: int, state: Any) -> None:
        """Copies a state to the host, and writes the copy in the background; see `wait`.

        Raises:
          StorageError: the previous save failed, or the disk has no room for this save.
        """
        self.wait()
        if step == self._last:  # the checkpoint of this step exists
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        part = self._directory / f"{step}{storage.PART}"
        processes.run_on_leader(lambda: self._make_room(step, part, needed))
        with storage.explain(self._directory / str(step)), contextlib.ExitStack() as stack:
            stack.enter_context(_silence_orbax())
            response = ocp.save_checkpointables_async(
                str(part.resolve()),
                {NAME: state},
                custom_metadata={"shapes": _shapes(state), _MARK: manifest.FORMAT},
            )
            until_saved = stack.pop_all()
        self._saved_at, self._last = time.monotonic(), step
        self._thread = threading.Thread(
            target=self._finish, args=(step, part, response, until_saved)
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until an unfinished save is complete.

        Raises:
          StorageError: the save failed on at least one process.
        """
        if self._thread is None:
            return
        self._thread.join()
        failures = processes.gather_texts(self._failure)
        self._thread, self._failure = None, ""
        if failed := next(filter(None, failures), ""):
            self._last = None
            raise storage.StorageError(failed)

    def _clean(self) -> None:
        with storage.explain(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            for path in self._directory.iterdir():
                if storage.PART in path.name or "orbax-checkpoint-tmp" in path.name:
                    storage.remove(path)

    def _make_room(self, step: int, part: pathlib.Path, needed: int) -> None:
        with storage.explain(self._directory / str(step)):
            storage.check_room(self._directory, needed)
            storage.remove(part)

    def _finish(
        self, step: int, part: pathlib.Path, response: Any, until_saved: contextlib.ExitStack
    ) -> None:
        """Completes a save after Orbax has written the files.

        The method runs in a thread of its own, which must not run any program on devices.
        """
        try:
            response.result()
            if processes.is_leader():
                self._publish(step, part)
            self.save_seconds = time.monotonic() - self._saved_at
        except BaseException as error:
            place = self._directory / str(step)
            sentence = f"{place} cannot be written ({_first_line(error)})"
            self._failure = str(error) if isinstance(error, storage.StorageError) else sentence
            if not isinstance(error, OSError) and not _find_disk_error(error):
                traceback.print_exception(error)  # replaces the log messages of Orbax
            if processes.is_leader():
                with contextlib.suppress(OSError):
                    for path in self._directory.glob(f"{step}{storage.PART}*"):
                        storage.remove(path)
        finally:
            until_saved.close()

    def _publish(self, step: int, part: pathlib.Path) -> None:
        """Gives a complete checkpoint its manifest and its name, and removes old checkpoints."""
        final = self._directory / str(step)
        with storage.explain(final):
            manifest.write_manifest(part)
            if final.exists():
                storage.remove(final)
            part.rename(final)
            storage.sync_folder(self._directory)
        for old in self.steps()[: -self._keep] if self._keep else []:
            storage.remove(self._directory / str(old))

    # ----------------------------------------------------------------------------------- loading

    def load(self, step: int, like: Any) -> Any:
        """Loads the state of a step, with the shardings of `like` (arrays or ShapeDtypeStructs).

        Raises:
          DamagedCheckpoint: the checkpoint is not whole.
          UnusableCheckpoint: the step was not saved, or the saved tree differs from `like`; the
            message names one difference.
          StorageError: a file exists, but cannot be read.
        """
        if step not in (saved := processes.run_on_leader(self.steps)):
            raise UnusableCheckpoint(
                f"no checkpoint of step {step} in {self._directory}: the choices are {saved}"
            )
        return read_state(self._directory / str(step), like)

    def check_part(self, step: int, part: str, like: Any) -> None:
        """Checks that a field of a saved State has the structure and shapes of `like`.

        Raises:
          DamagedCheckpoint: the checkpoint is not whole.
          UnusableCheckpoint: the saved field differs from `like`; the message names one difference.
        """
        folder = self._directory / str(step)
        _raise_if_damaged(folder, _find_damage(folder))
        _compare_shapes(folder, f".{part}", like)

    def load_part(self, step: int, part: str, like: Any) -> Any:
        """Loads one field of a saved State, such as `trained`, with the shardings of `like`."""
        self.check_part(step, part, like)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return _load(self._directory / str(step), {NAME: {part: like}})[NAME][part]

    def load_newest(self, like: Any) -> Any:
        """Loads the newest whole checkpoint; prints one sentence for each damaged checkpoint.

        A writer moves damaged checkpoints to the folder `damaged` beside the checkpoints, so that
        their steps can be saved again.

        Args:
          like: a state with the shapes and shardings of the saved state.

        Returns:
          The loaded state, or `like` itself if no checkpoint is whole.

        Raises:
          UnusableCheckpoint, StorageError: as in `load`.
        """
        state, used, damaged = like, 0, {}
        for step in reversed(processes.run_on_leader(self.steps)):
            try:
                state, used = self.load(step, like), step
                self._last = step
                break
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
        what = f"checkpoint {used} is used" if used else "it is skipped"
        for step, reason in damaged.items():
            print(f"{reason}: {what}", flush=True)
            if self._writer:
                processes.run_on_leader(lambda step=step: self._set_aside(step))
        if damaged and not used and self._writer:
            print("no checkpoint is whole, so step 0 is used", flush=True)
        return state

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint to the folder `damaged`."""
        folder = self._directory.parent / "damaged"
        with storage.explain(folder):
            folder.mkdir(exist_ok=True)
            number, place = 1, folder / f"checkpoint_{step}"
            while place.exists():
                number, place = number + 1, folder / f"checkpoint_{step}_{number + 1}"
            (self._directory / str(step)).rename(place)
            storage.sync_folder(self._directory)


def write_state(path: pathlib.Path, state: Any) -> None:
    """Writes a state to a folder of its own; replaces the folder if it exists.

    No run continues from this folder. All processes must call this function, because each process
    writes its own parts of the arrays.
    """
    try:
        with _silence_orbax():
            ocp.save_checkpointables(
                str(path.resolve()),
                {NAME: state},
                overwrite=True,
                custom_metadata={"shapes": _shapes(state), _MARK: manifest.FORMAT},
            )
        processes.run_on_leader(lambda: manifest.write_manifest(path))
    except Exception as error:  # Orbax reports a full disk by errors of several types
        raise storage.StorageError(f"{path} cannot be written ({_first_line(error)})") from error


def read_state(path: pathlib.Path, like: Any) -> Any:
    """Reads the state of a checkpoint or of `write_state`, with the shardings of `like`.

    Raises:
      DamagedCheckpoint: the folder is not whole.
      UnusableCheckpoint: the saved tree differs from `like`; the message names one difference.
      StorageError: a file exists, but cannot be read.
    """
    _raise_if_damaged(path, _find_damage(path))
    _compare_shapes(path, "", like)
    return _load(path, {NAME: like})[NAME]
