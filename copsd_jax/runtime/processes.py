"""Several processes that are one run: how they find each other, and what only one of them does.

Every process runs the same code on the same numbers and calls the same programs in the same order;
each holds its own devices' part of every array. What may come out differently on two machines
(clocks, servers, files that are being written) is done by the leading process alone, and the others
get its result: `run_on_leader`. Only the leading process writes files and says how the run goes.
"""

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from copsd_jax.config import settings as config_lib

Result = TypeVar("Result")

_NOWHERE = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process


def connect(config: config_lib.Config) -> None:
    """Joins the processes of `mesh.*`, before anything asks for a device; one process joins none.

    mesh.coordinator is '' for one process, or 'auto' where Cloud TPU, GKE, SLURM or MPI tell the
    processes, or host:port with mesh.processes and mesh.process. A process that is silent for
    mesh.heartbeat seconds counts as dead, and ends all others.

    Raises:
      ValueError: the others cannot be found; the message names the setting.
    """
    m = config.mesh
    if not m.coordinator or jax.distributed.is_initialized():
        return
    known: dict[str, Any] = {}
    if m.coordinator != "auto":
        known = {
            "coordinator_address": m.coordinator,
            "num_processes": m.processes,
            "process_id": m.process,
        }
    try:
        jax.distributed.initialize(**known, heartbeat_timeout_seconds=m.heartbeat)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"mesh.coordinator is {m.coordinator!r}: {reason}") from error
    if not is_leader():
        sys.stdout = _NOWHERE  # errors alone, on stderr


def is_leader() -> bool:
    """Returns whether this process writes the files and shows the progress."""
    return jax.process_index() == 0


def progress_stream() -> TextIO:
    """Returns the stream for progress: stderr of the leading process, nothing for the others."""
    return sys.stderr if is_leader() else _NOWHERE


def run_on_leader(function: Callable[[], Result]) -> Result:
    """Calls `function` on the leading process alone, and returns its result on all of them.

    All processes wait here for the result, and an error of the leading process is raised on all.

    Raises:
      Exception: the error of `function`; a RuntimeError with its text if it cannot be pickled.
    """
    if jax.process_count() == 1:
        return function()
    said = b""
    if is_leader():
        try:
            said = pickle.dumps((function(), None))
        except Exception as error:
            said = _pickled(error)
    result, error = pickle.loads(_broadcast(said))
    if error is not None:
        raise error
    return result


def _pickled(error: Exception) -> bytes:
    try:
        said = pickle.dumps((None, error))
        pickle.loads(said)  # an exception with arguments of its own may not come back
    except Exception:
        return pickle.dumps((None, RuntimeError(repr(error))))
    return said


def wait_for_all(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _broadcast(said: bytes) -> bytes:
    """Returns the leading process's bytes on all; padded to powers of two, for few compilations."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    room = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)
    room[: len(said)] = np.frombuffer(said, np.uint8)
    whole = np.asarray(multihost_utils.broadcast_one_to_all(room))
    return whole[:size].tobytes()
