"""Files on a disk that may fail: whole writes, appended lines, checked reads, clear errors.

A file is either written as a whole (temporary name, flush, rename) or extended by whole lines. If a
write fails, no partly written file or line remains.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

PART = ".part"  # the suffix of files and folders that are not complete yet
# Error numbers that concern the whole disk, not a single file.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


class StorageError(OSError):
    """A failed access to a file of the run; the message is one sentence with path and reason."""


def parse_path(text: str) -> pathlib.Path:
    """Returns the path that a flag or setting names.

    A shell does not expand the `~` in `--flag=~/x`, so this function expands it.
    """
    return pathlib.Path(os.path.expanduser(text))


def check_local(flag: str, path: str | pathlib.Path) -> None:
    """Checks that a path is not a URL, such as gs://bucket/run.

    Args:
      flag: the flag or setting, for the message.
      path: the path; a `Path` shows gs://bucket as gs:/bucket.

    Raises:
      ValueError: the path is a URL.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        shown = re.sub(":/(?!/)", "://", str(path), count=1)
        raise ValueError(
            f"{flag}={shown} is a URL, and the program writes only to folders: mount "
            "the bucket or disk, and give the path of a folder on it"
        )


@contextlib.contextmanager
def explain(path: pathlib.Path, action: str = "written") -> Iterator[None]:
    """Turns an OSError into a StorageError that names the path and the reason.

    Args:
      path: the file or folder that the block accesses.
      action: the word for the failed access in the message, such as "written" or "read".

    Raises:
      StorageError: raised in place of OSError.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        # A file is in the place of a folder: at `path`, at a parent of `path`, or inside `path`.
        if isinstance(error, FileExistsError | NotADirectoryError) and error.filename is not None:
            reason += f": {error.filename}"
        raise StorageError(f"{path} cannot be {action} ({reason})") from error


def sync_folder(folder: pathlib.Path) -> None:
    """Flushes the list of a folder's files to the disk, if the file system supports this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def write_whole(path: pathlib.Path, lines: Iterable[str | bytes]) -> None:
    """Writes a file under a temporary name, flushes it to the disk, and renames it.

    Raises:
      StorageError: the file cannot be written; an existing file is unchanged.
    """
    temporary = path.with_name(path.name + PART)
    with explain(path):
        try:
            with temporary.open("wb") as stream:
                for line in lines:
                    stream.write(line.encode() if isinstance(line, str) else line)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


class Appender:
    """Appends whole records to a file, each with a single write.

    Raises:
      StorageError: the file cannot be opened.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        with explain(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, record: bytes) -> None:
        """Appends a record; if the disk has no room for the whole record, removes the written part.

        Raises:
          StorageError: the record cannot be written; the file is unchanged.
        """
        with explain(self.path):
            size = os.fstat(self._descriptor).st_size
            try:
                if os.write(self._descriptor, record) < len(record):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._descriptor, size)
                raise

    def sync(self) -> None:
        """Waits until the file is on the disk."""
        with explain(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------- checked reads


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file that contains one JSON object.

    Raises:
      ValueError: the file contains something else; the message names the file and the line.
      StorageError: the file cannot be read.
    """
    with explain(path, "read"):
        return _parse_object(path.read_bytes(), f"{path}", "valid JSON")


def read_lines(path: pathlib.Path, form: Mapping[str, Any]) -> tuple[list[dict], list[bytes]]:
    """Reads a JSON Lines file with one object per line; an incomplete last line is not parsed.

    Args:
      path: the file.
      form: the fields of every line; see `check_form`.

    Returns:
      The objects, and a list with the bytes of each line, without the newline. This list has one
      more entry for the bytes after the last newline. If the last line is complete, this entry is
      b"".

    Raises:
      ValueError: a line is not an object of this form; the message names the file and the line.
      StorageError: the file cannot be read.
    """
    with explain(path, "read"):
        lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        row = _parse_object(line, f"{path} line {number}", "JSON")
        check_form(row, form, f"{path} line {number}")
        rows.append(row)
    return rows, lines


# The types that JSON can have, in words.
_WORDS = {bool: "true or false", int: "a whole number", str: "text", list: "a list",
          dict: "an object", type(None): "null"}  # fmt: skip


def check_form(value: Any, form: Any, place: str, name: str = "") -> None:
    """Checks the types of a value that was read from JSON.

    For example, `{"id": str, "texts": [(str, type(None))], "seed?": int}` is the form of an object
    with an id, a list of texts or nulls, and perhaps a seed. An object may have further fields.

    Args:
      value: the value.
      form: a type, a tuple of types, a list with the form of each item, or a dict with the form of
        each field.
      place: the file or the line, for the message.
      name: the name of the value in `place`, for the message; "" for the whole content.

    Raises:
      ValueError: the value has another form; the message names the place and the part of the value.
    """
    types = form if isinstance(form, tuple) else (form if isinstance(form, type) else type(form),)
    if type(value) not in types:
        words = " or ".join(_WORDS[kind] for kind in types)
        raise ValueError(f"{place} has {name} = {reprlib.repr(value)}: it must be {words}")
    if isinstance(form, list):
        for number, item in enumerate(value):
            check_form(item, form[0], place, f"{name}[{number}]")
    if isinstance(form, dict):
        for key, inner in form.items():
            field, full = key.rstrip("?"), f"{name}.{key}".strip(".?")
            if field in value:
                check_form(value[field], inner, place, full)
            elif field == key:
                raise ValueError(f"{place} has no {full!r}")


def check_stored_step_order(path: pathlib.Path, rows: list[dict], strict: bool) -> None:
    """Checks that the values of the field `step` ascend from row to row.

    Args:
      path: the file of the rows, for the message.
      rows: the rows of the file, in order; each has a whole number as `step`.
      strict: whether each step may occur only once.

    Raises:
      ValueError: a step is out of order.
    """
    last = -1
    for number, row in enumerate(rows, 1):
        step = row["step"]
        if step < last + strict:
            raise ValueError(
                f"{path} line {number} has step {step}, although the line before it has step "
                f"{last if last >= 0 else 'none'}: the steps of this file must ascend"
            )
        last = step


def _parse_object(data: bytes, place: str, form: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f" (line {line})" if line > 1 else ""
        reason = f"byte {error.start} is not valid UTF-8{where}"
        raise ValueError(f"{place} is not {form}: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not {form}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} is not a JSON object")
    return value


# ------------------------------------------------------------------------------------- folders


def check_room(folder: pathlib.Path, needed: int) -> None:
    """Checks that a folder can be written to, and that its disk has room.

    Args:
      folder: an existing folder.
      needed: the number of bytes to be written.

    Raises:
      OSError: the folder cannot be written to, or the disk has too little room.
    """
    probe = folder / f"probe_{os.getpid()}{PART}"
    try:
        with probe.open("wb") as stream:
            stream.write(bytes(4096))
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    disk = shutil.disk_usage(folder)
    # Some mounted buckets report a size of 0.
    if disk.total and disk.free < needed:
        raise OSError(
            errno.ENOSPC, f"it needs {needed:,} bytes, but the disk has only {disk.free:,} left"
        )


def remove(path: pathlib.Path) -> None:
    """Removes a folder with its contents, or a file.

    A folder gets another name first, so that a partly removed folder cannot be mistaken for a whole
    folder.

    Raises:
      StorageError: the folder or file cannot be removed.
    """
    with explain(path, "removed"):
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        if not path.name.endswith(PART):
            doomed = path.with_name(f"{path.name}.old{PART}")
            if doomed.exists():
                shutil.rmtree(doomed)
            path = path.rename(doomed)
        shutil.rmtree(path)
