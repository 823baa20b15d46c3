"""Ways to damage a file, for tests of what a run does about it."""

import pathlib
import shutil
from collections.abc import Callable


def truncate(path: pathlib.Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def zero(path: pathlib.Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: pathlib.Path) -> None:
    """Flips one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)


def delete(path: pathlib.Path) -> None:
    path.unlink()


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def empty_folder(path: pathlib.Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def garbage_line(path: pathlib.Path) -> None:
    """Puts a line without meaning after the first line."""
    first, *rest = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, b"\xff\xfe garbage", *rest]))


def tear(path: pathlib.Path) -> None:
    """Adds the first half of a line."""
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')


FILE: dict[str, Callable[[pathlib.Path], None]] = {
    "truncated": truncate, "zeroed": zero, "one bit flipped": flip, "deleted": delete,
    "emptied": empty,
}  # fmt: skip
LINES = FILE | {"garbage line": garbage_line, "torn line": tear}
# Files of a checkpoint, relative to its folder. `*` stands for names that differ from run to run.
CHECKPOINT_FILES = (
    "manifest.json", "_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding",
    "state/manifest.ocdbt", "state/array_metadatas/process_0", "state/d/*",
    "state/ocdbt.process_0/d/*", "state/ocdbt.process_0/manifest.ocdbt",
)  # fmt: skip


def find(folder: pathlib.Path, name: str) -> pathlib.Path:
    return sorted(folder.glob(name))[0]
