"""The manifest of a folder: the size and the SHA-256 of every file.

A folder is whole if its manifest is intact, and each file has the size and the checksum that the
manifest states.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib

from copsd_jax.runtime import storage

NAME = "manifest.json"
FORMAT = 1
_THREADS = 4  # number of threads for hashing, which releases Python's global lock


def write_manifest(folder: pathlib.Path) -> None:
    """Writes the manifest of a complete folder, and flushes all its files to the disk.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    names = sorted(_list_files(folder))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda name: _measure_file(folder / name, sync=True), names))
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        storage.sync_folder(inner)
    storage.write_whole(folder / NAME, [_render(dict(zip(names, found, strict=True)))])


def find_damage(folder: pathlib.Path, share: int = 0, shares: int = 1) -> str:
    """Returns the reason why a folder is not whole, or "" if the folder is whole.

    Args:
      folder: a folder with a manifest.
      share: the index of the share of files to check.
      shares: the number of shares into which several processes divide the files.

    Raises:
      OSError: a file exists, but cannot be read.
    """
    text = (folder / NAME).read_bytes()
    try:
        files = json.loads(text)["files"]
        intact = _render(files).encode() == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        return f"its {NAME} is unreadable"
    names = sorted(files)[share::shares]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        reasons = pool.map(lambda name: _compare_file(folder, name, *files[name]), names)
        return next(filter(None, reasons), "")


def _render(files: dict[str, tuple[int, str]]) -> str:
    """Returns the manifest's text, which ends with a checksum of its list of files."""
    content = json.dumps(files, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return f'{{"format": {FORMAT}, "files": {content}, "sha256": "{digest}"}}\n'


def _list_files(folder: pathlib.Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _measure_file(path: pathlib.Path, sync: bool = False) -> tuple[int, str]:
    """Returns the size and the SHA-256 of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if sync:
            os.fsync(stream.fileno())
        return stream.tell(), digest


def _compare_file(folder: pathlib.Path, name: str, size: int, digest: str) -> str:
    """Returns how a file differs from its entry in the manifest, or "" if they agree."""
    path = folder / name
    if not path.is_file():
        return f"file {name} is missing"
    if (found := path.stat().st_size) != size:
        return f"file {name} has {found} bytes instead of {size}"
    if _measure_file(path)[1] != digest:
        return f"file {name} no longer has the contents that were saved"
    return ""
