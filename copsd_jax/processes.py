"""Several processes that are one run: how they find each other, and what only one of them does.

Every process runs the same code on the same numbers and calls the same programs in the same order;
each holds its own devices' part of every array. What may come out differently on two machines
(clocks, servers, files that are being written) is done by the leading process alone, and the others
get its result: `once`. Only the leading process writes files and says how the run goes.
"""

import io
import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from copsd_jax import config as config_lib

Result = TypeVar("Result")


def start(config: config_lib.Config) -> None:
    """Joins the processes of `mesh.*`, before anything asks for a device; nothing for a run alone.

    mesh.coordinator is '' for one process, 'auto' where Cloud TPU, GKE, SLURM or MPI say who is
    there, or host:port with mesh.processes and mesh.process. A process that is silent for
    mesh.heartbeat seconds is taken for dead, and ends all others.

    Raises:
      ValueError: if the others cannot be found, naming the setting.
    """
    m = config.mesh
    if not m.coordinator or jax.distributed.is_initialized():
        return
    known = {}
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
    if not leads():
        sys.stdout = io.StringIO()  # errors alone, on stderr


def leads() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def once(function: Callable[[], Result]) -> Result:
    """What `function` returns on the leading process, on all of them; it is called there alone.

    All processes wait here for it. What it returns or raises has to be picklable.

    Raises:
      Exception: what it raises there, everywhere.
    """
    if jax.process_count() == 1:
        return function()
    told: Any = None
    if leads():
        try:
            told = (function(), None)
        except Exception as error:
            told = (None, error)
    result, error = _broadcast(told)
    if error is not None:
        raise error
    return result


def meet(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _broadcast(value: Any) -> Any:
    """The leading process's value, on all; sizes in powers of two, for few compilations."""
    said = np.frombuffer(pickle.dumps(value), np.uint8) if leads() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(said.size)))
    room = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)
    room[: said.size] = said
    whole = np.asarray(multihost_utils.broadcast_one_to_all(room))
    return pickle.loads(whole[:size].tobytes())
