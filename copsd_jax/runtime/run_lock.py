"""The lock of a work directory, which lets only one run write to the directory at a time.

The lock has two parts. Both expire when the process that holds them ends:

  W/lock        a lock of the operating system (flock), for processes on one machine; the system
                releases the lock when the process ends
  W/lease.json  a lease, for processes on several machines and for file systems without flock; the
                holder of the lease writes the file again every few seconds

A lease is stale if its file has not changed for `STALE` seconds by the clock of the file system,
or if its holder is a process of this machine that has ended.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from copsd_jax.runtime import processes, storage

BEAT, STALE = 5.0, 20.0  # seconds
# Error numbers of flock on a file system without locks.
_UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


class LockedError(ValueError):
    """The work directory is in use by another process, described in one sentence."""


def check(directory: pathlib.Path) -> None:
    """Checks that no process of this machine holds the lock of a directory; changes nothing.

    Raises:
      LockedError: another process runs in the directory.
      StorageError: the lock cannot be read.
    """
    path = directory / "lock"
    with storage.explain(path, "read"):
        if path.is_file():
            with path.open("rb") as stream:
                _lock(stream.fileno(), fcntl.LOCK_SH, directory)


@contextlib.contextmanager
def hold(directory: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a directory on behalf of all processes of the run; creates the directory.

    Raises:
      LockedError: another process runs in the directory.
      StorageError: the lock cannot be written.
    """
    with contextlib.ExitStack() as stack:

        def acquire() -> None:
            locked = stack.enter_context(_hold_flock(directory))
            stack.enter_context(_hold_lease(directory, confirm=not locked))

        processes.run_on_leader(acquire)
        yield


def _describe_holder() -> dict[str, Any]:
    return {**_describe_machine(), "pid": os.getpid(), "time": time.time()}


def _describe_machine() -> dict[str, str]:
    """Describes the machine or container in which the id of this process is valid.

    A host name alone does not identify a container.
    """
    described = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):  # not Linux
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        described["namespace"] = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return described


def _refuse(directory: pathlib.Path, holder: dict[str, Any]) -> LockedError:
    return LockedError(
        f"--workdir={directory} is in use by {_name_holder(holder)}: wait until it ends, or choose "
        "another directory"
    )


def _name_holder(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"


def _read_holder(path: pathlib.Path) -> dict[str, Any]:
    """Reads a lock or lease; returns {} if the file is unreadable, damaged or incomplete."""
    try:
        holder = storage.read_object(path)
        storage.check_form(holder, {"pid": int, "host": str, "token?": str}, f"{path}")
    except (OSError, ValueError):
        return {}
    return holder if 0 < holder["pid"] < 2**31 else {}


# ------------------------------------------------------------------------------------------ flock


def _lock(descriptor: int, kind: int, directory: pathlib.Path) -> bool:
    """Tries to lock an open file; returns False if the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _refuse(directory, _read_holder(directory / "lock")) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


@contextlib.contextmanager
def _hold_flock(directory: pathlib.Path) -> Iterator[bool]:
    """Holds the lock W/lock; yields False if the file system does not support such locks."""
    path = directory / "lock"
    with storage.explain(path):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # not open in child programs
    try:
        with storage.explain(path, "locked"):
            if locked := _lock(descriptor, fcntl.LOCK_EX, directory):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_describe_holder()).encode(), 0)
        yield locked
    finally:
        os.close(descriptor)  # releases the lock


# ------------------------------------------------------------------------------------------ lease


@contextlib.contextmanager
def _hold_lease(directory: pathlib.Path, confirm: bool) -> Iterator[None]:
    """Holds the lease of a directory.

    If `confirm` is true, the function waits briefly after writing the lease, and then checks that
    no other process has taken the lease at the same time.
    """
    path, token = directory / "lease.json", uuid.uuid4().hex
    _wait_for_lease(directory, path)
    lease = {**_describe_holder(), "token": token, "beat": 0}
    storage.write_whole(path, [json.dumps(lease)])
    if confirm:
        time.sleep(BEAT / 10)
        if (holder := _read_holder(path)).get("token") != token:
            raise _refuse(directory, holder)
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, lease, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            if _read_holder(path).get("token") == token:
                path.unlink()


def _wait_for_lease(directory: pathlib.Path, path: pathlib.Path) -> None:
    """Waits until it is known whether another process holds the lease.

    Raises:
      LockedError: another process renewed the lease during the wait.
    """
    seen, said = _last_change(path), False
    while seen is not None and not _is_over(_read_holder(path)):
        if _clock(directory) - seen > STALE:
            return
        if not said:
            print(
                f"waiting for at most {STALE:.0f} s, to see whether "
                f"{_name_holder(_read_holder(path))} still runs in {directory}",
                flush=True,
            )
            said = True
        time.sleep(BEAT / 10)
        now = _last_change(path)
        if now is not None and now != seen:
            raise _refuse(directory, _read_holder(path))
        seen = now


def _last_change(path: pathlib.Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _clock(directory: pathlib.Path) -> float:
    """Returns the time by the clock of the file system, which may be on another machine."""
    probe = directory / f"clock_{os.getpid()}{storage.PART}"
    with storage.explain(directory):
        try:
            probe.write_bytes(b"1")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def _is_over(holder: dict[str, Any]) -> bool:
    """Returns whether the holder was a process of this machine that has ended."""
    here = _describe_machine()
    if any(holder.get(name) != here[name] for name in here):
        return False
    if holder["pid"] == os.getpid():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # the process exists, but belongs to another user
        return False
    return False


def _renew(path: pathlib.Path, lease: dict[str, Any], ended: threading.Event) -> None:
    """Renews the lease until `ended` is set; ends the program if another process took the lease.

    While this machine is suspended, another process may take the lease, and may then end.
    """
    beaten = time.time()  # this clock also advances while the machine is suspended
    while not ended.wait(BEAT):
        holder = _read_holder(path)
        lost = not holder and time.time() - beaten > STALE
        if lost or holder.get("token", lease["token"]) != lease["token"]:
            who = _name_holder(holder)
            print(f"error: {who} has taken over {path.parent}", file=sys.stderr, flush=True)
            os._exit(1)
        lease["beat"] += 1
        # If the disk fails, the run's own writes report the failure.
        with contextlib.suppress(OSError):
            storage.write_whole(path, [json.dumps(lease)])
            beaten = time.time()
