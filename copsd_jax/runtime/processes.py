"""Runs of several processes: how processes connect, and work that only the leading process does.

Every process runs the same code on the same numbers, and calls the same programs in the same order.
Each process holds only those parts of arrays that are on its own devices. Some values could differ
between two processes: clock times, replies of servers, and the contents of files that are being
written. Only the leading process reads values that could differ; it sends these values to all
other processes (`run_on_leader`). Only the leading process writes files and reports progress.
"""

import os
import pickle
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from copsd_jax.config import settings as config_lib

Result = TypeVar("Result")

_NOWHERE = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until exit


def join_processes(config: config_lib.Config) -> None:
    """Joins the other processes described by `mesh.*`; does nothing if there is only one process.

    Call this function before anything uses a device. For a single process, mesh.coordinator is ''.
    On Cloud TPU, GKE, SLURM or MPI, JAX detects the processes, and mesh.coordinator is 'auto'. In
    every other run of several processes, mesh.coordinator is host:port, and mesh.processes and
    mesh.process are also set. A process that is silent for mesh.heartbeat seconds counts as
    dead, and all other processes then end.

    Raises:
      ValueError: the other processes cannot be found, or JAX cannot start a device; the message
        names the setting.
    """
    m = config.mesh
    if not m.coordinator or jax.distributed.is_initialized():
        list_devices()
        return
    known: dict[str, Any] = {}
    if m.coordinator != "auto":
        known = {
            "coordinator_address": m.coordinator,
            "num_processes": m.processes,
            "process_id": m.process,
        }
    # JAX's preemption service would replace the handler of SIGTERM that `signals` has set.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**known, heartbeat_timeout_seconds=m.heartbeat)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"mesh.coordinator is {m.coordinator!r}: {reason}") from error
    list_devices()
    if not is_leader():
        sys.stdout = _NOWHERE  # all processes but the leader print only errors, to stderr


def list_devices() -> list:
    """Returns all devices of JAX; the first call starts JAX's platforms.

    Raises:
      ValueError: JAX cannot start a platform, for example a platform named in JAX_PLATFORMS.
    """
    try:
        return jax.devices()
    # If JAX_PLATFORMS is cuda and there is no GPU, JAX raises an AssertionError without a text.
    except (RuntimeError, AssertionError) as error:
        named = os.environ.get("JAX_PLATFORMS", "")
        # The end of JAX's message is advice in parentheses, which is removed here.
        reason = re.split(r" \((?:set JAX_PLATFORMS|you may need)", str(error))[0].rstrip(".")
        reason = reason or ("there is no GPU" if "cuda" in named else type(error).__name__)
        if named:
            advice = "set this environment variable to cpu, or unset it"
            raise ValueError(
                f"JAX_PLATFORMS is {named!r}, but JAX cannot start these platforms ({reason}): "
                f"{advice}"
            ) from error
        raise ValueError(
            f"JAX cannot start a platform ({reason}): set JAX_PLATFORMS=cpu to use the CPU"
        ) from error


def is_leader() -> bool:
    """Returns whether this process writes the files and shows the progress."""
    return jax.process_index() == 0


def progress_stream() -> TextIO:
    """Returns the stream for progress: stderr on the leading process, the null device elsewhere."""
    return sys.stderr if is_leader() else _NOWHERE


def run_on_leader(function: Callable[[], Result]) -> Result:
    """Calls `function` on the leading process alone, and returns the result on all processes.

    All processes wait for the result. An error on the leading process is raised on all processes.

    Raises:
      Exception: the error that `function` raised. If that error cannot be pickled, a RuntimeError
        with the error's `repr` is raised instead.
    """
    if jax.process_count() == 1:
        return function()
    said = b""
    if is_leader():
        try:
            said = pickle.dumps((function(), None))
        except Exception as error:
            said = _pickle_error(error)
    result, error = pickle.loads(_broadcast(said))
    if error is not None:
        raise error
    return result


def _pickle_error(error: Exception) -> bytes:
    try:
        said = pickle.dumps((None, error))
        pickle.loads(said)  # an exception with extra arguments may fail to unpickle
    except Exception:
        return pickle.dumps((None, RuntimeError(repr(error))))
    return said


def exit_with_error(message: str, error: BaseException) -> NoReturn:
    """Ends the program with a message and exit code 1.

    The error may have occurred on this process alone. With several processes, the regular exit
    would wait for the other processes, which wait for this process. Therefore this process ends at
    once. The other processes end when they no longer get its heartbeat.

    Raises:
      SystemExit: there is only one process.
    """
    if jax.process_count() == 1:
        raise SystemExit(message) from error
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def wait_for_all(name: str) -> None:
    """Waits until all processes have called this function with the same `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree_on_largest(number: int) -> int:
    """Returns the largest of the int32 numbers that the processes pass to this function."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def gather_texts(text: str) -> list[str]:
    """Returns the texts of all processes, in the order of the processes; long texts are cut."""
    if jax.process_count() == 1:
        return [text]
    room = np.zeros(512, np.uint8)
    data = np.frombuffer(text.encode()[: room.size], np.uint8)
    room[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(room))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def _broadcast(said: bytes) -> bytes:
    """Sends the leader's bytes to all processes, padded so that JAX compiles only a few sizes."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    room = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)
    room[: len(said)] = np.frombuffer(said, np.uint8)
    whole = np.asarray(multihost_utils.broadcast_one_to_all(room))
    return whole[:size].tobytes()
