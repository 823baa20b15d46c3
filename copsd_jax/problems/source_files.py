"""The files of a source: one file, the shards of a folder or glob, and their uncompressed bytes."""

import errno
import glob
import gzip
import os
import pathlib
import zlib
from typing import NamedTuple

SUFFIXES = (".jsonl", ".json", ".parquet", ".tsv", ".csv")
COMPRESSED = (".gz", ".zst")  # of all kinds but parquet, which is compressed inside
_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1": ".parquet",
    b"PK\x03\x04": ".zip",
}


class Shard(NamedTuple):
    """A file of a source.

    Attributes:
      path: the file.
      name: the name of the file in messages.
      kind: one of `SUFFIXES`.
    """

    path: pathlib.Path
    name: str
    kind: str


def find_kind(name: str) -> str:
    """Returns which of `SUFFIXES` a file has, before `.gz` or `.zst`; "" for none."""
    stem, end = os.path.splitext(name)
    kind = os.path.splitext(stem)[1] if end in COMPRESSED else end
    return kind if kind in SUFFIXES and not (kind == ".parquet" and end in COMPRESSED) else ""


def is_tsv(path: str) -> bool:
    """Returns whether a path names TSV files; false for a path without files."""
    place = pathlib.Path(os.path.expanduser(path))
    names = [x.name for x in place.iterdir()] if place.is_dir() else [place.name]
    return any(find_kind(name) == ".tsv" for name in names)


def find_shards(path: str, setting: str) -> list[Shard]:
    """Finds the files of a source, sorted by name.

    Args:
      path: a file, a folder, or a glob such as `data/*.jsonl.gz`.
      setting: the name of the setting that gives `path`, for error messages.

    Raises:
      OSError: there is no such file, or a folder cannot be read.
      ValueError: a file has another ending, the files are of several kinds, or there are none.
    """
    place = pathlib.Path(os.path.expanduser(path))
    try:
        if place.is_dir():
            files = [x for x in place.iterdir() if x.is_file() and x.name[0] not in "._"]
            files = [x for x in files if find_kind(x.name)]
            advice = "a folder must contain the files itself, not in further folders"
        elif not place.exists() and glob.has_magic(path):
            files = [pathlib.Path(x) for x in glob.glob(str(place), recursive=True)]
            files = [x for x in files if x.is_file()]
            advice = "no file matches it"
        else:
            return [_check_file(place, path, setting)]
    except OSError as error:
        raise type(error)(f"{setting} is {path!r}: {error.strerror}") from error
    files.sort()
    if not files:
        ends = ", ".join(SUFFIXES)
        raise FileNotFoundError(
            f"{setting} is {path!r}: {advice}; it needs files that end in {ends}, which may be "
            f"followed by {' or '.join(COMPRESSED)}"
        )
    shards = [Shard(_check_file(x, path, setting).path, str(x), find_kind(x.name)) for x in files]
    kinds = {"".join(x.suffixes[-2:] if x.suffix in COMPRESSED else x.suffixes[-1:]): x.name
             for x in files}  # fmt: skip
    if len(kinds) > 1:
        folder = place if place.is_dir() else place.parent
        found = ", ".join(sorted(kinds.values())[:3])
        raise ValueError(
            f"{setting} is {path!r}: its files are of several kinds ({found}); choose one kind, "
            f"such as {folder}/*{sorted(kinds)[0]}"
        )
    return shards


def _check_file(file: pathlib.Path, path: str, setting: str) -> Shard:
    """Refuses a path that is no file or has an unknown ending."""
    if not find_kind(file.name):
        raise ValueError(
            f"{setting} is {path!r}: a file must end in {', '.join(SUFFIXES)}, and all but "
            f".parquet may be followed by {' or '.join(COMPRESSED)}; other choices are "
            "bundled:NAME, tfds:NAME/SPLIT and hf:OWNER/NAME:SPLIT"
        )
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file")
    return Shard(file, path, find_kind(file.name))


def read_shard(shard: Shard, setting: str) -> bytes:
    """Reads and uncompresses a file.

    Args:
      shard: the file.
      setting: the name of the setting that gives the source, for error messages.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is damaged, or its content is not what its name says.
    """
    try:
        raw = shard.path.read_bytes()
    except OSError as error:
        raise type(error)(f"{setting} is {shard.name!r}: {error.strerror}") from error
    end = shard.path.suffix
    if end in COMPRESSED:
        found = next((e for magic, e in _MAGIC.items() if raw.startswith(magic)), "other")
        if found != end:
            raise ValueError(f"{shard.name}: the content is {found} data, not {end} data")
        raw = _uncompress(shard.name, end, raw)
    if shard.kind != ".parquet":
        for magic, content in _MAGIC.items():
            if raw.startswith(magic):
                raise ValueError(
                    f"{shard.name}: the content is {content} data, not text; rename or unpack the "
                    "file"
                )
    return raw


def _uncompress(name: str, end: str, raw: bytes) -> bytes:
    # pyarrow is imported lazily, because the import is slow.
    try:
        if end == ".gz":
            return gzip.decompress(raw)
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), "zstd") as stream:
            return stream.read()
    except (EOFError, OSError, zlib.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: the {end} data are damaged or cut ({reason})") from error
