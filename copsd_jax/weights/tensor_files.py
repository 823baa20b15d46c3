"""Safetensors files, JSON files, and folders that get their final names only when complete.

The `safetensors` library checks the header when a file is opened, and can read a slice without
reading the whole tensor. If ml_dtypes is imported, the `safetensors` library returns bfloat16
arrays. This module writes safetensors files itself, because the `safetensors` library needs all
tensors of a file in memory at once.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """A stored tensor that has not been read yet.

    Attributes:
      shape: shape of the whole tensor.
      read: `read()` returns all values. `read(part)` returns the values in the given part. `part`
        is a tuple with one slice per axis, each with explicit start and stop inside the shape.
        Little more than the requested part is read from the file.
    """

    shape: tuple[int, ...]
    read: Callable[..., np.ndarray]


def convert_dtype(name: str, tensor: Tensor, dtype: np.dtype) -> Tensor:
    """Returns a tensor whose values get another dtype when they are read.

    Args:
      name: name of the tensor, for the error message.
      tensor: the tensor; all its values are finite.
      dtype: the new dtype. Reading raises a ValueError if `dtype` cannot hold a value.
    """

    def read(*part: tuple[slice, ...]) -> np.ndarray:
        values = tensor.read(*part)
        with np.errstate(over="ignore"):  # the next lines report an overflow
            out = values.astype(dtype, copy=False)
        if not np.isfinite(out).all():
            worst = float(np.abs(values.astype(np.float32)).max())
            raise ValueError(
                f"tensor {name} has a value of magnitude {worst:.6g}, but {dtype} holds at most "
                f"{float(ml_dtypes.finfo(dtype).max):.6g}"
            )
        return out

    return Tensor(tensor.shape, read)


def read_json(file: pathlib.Path) -> dict:
    """Reads a file that contains one JSON object.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file does not contain a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object")
    return value


def write_json(file: pathlib.Path, value: dict) -> None:
    """Writes a JSON object with indentation and a final newline."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def create_weights_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Creates a folder with a temporary name; renames it to `target` if the `with` block succeeds.

    The folder gets the name `target` only when its files are complete.

    Args:
      target: the folder's final path; it must be absent or an empty folder.

    Raises:
      FileExistsError: if `target` exists and is not an empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rmdir()  # The target is an empty folder, as checked above.
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_file(file: pathlib.Path) -> dict[str, Tensor]:
    """Maps names to the tensors of one safetensors file; only the header is read.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is truncated or damaged, or if a tensor's dtype is not supported.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        # The type is Any, because the stub file of `safetensors` does not cover NumPy arrays.
        opened: Any = safetensors.safe_open(file, framework="numpy")
    except Exception as error:  # the library's errors have no common class
        size = file.stat().st_size
        raise ValueError(f"{file} is truncated or damaged ({size} bytes): {error}") from error
    tensors = {}
    for name in opened.keys():  # noqa: SIM118 - `opened` is no mapping
        stored = opened.get_slice(name)
        if (kind := stored.get_dtype()) not in DTYPES:
            raise ValueError(
                f"{file}: tensor {name} has type {kind}, which is not supported (supported: "
                f"{', '.join(DTYPES)})"
            )
        tensors[name] = Tensor(
            tuple(stored.get_shape()), functools.partial(_copy_stored_tensor, stored)
        )
    return tensors


def _copy_stored_tensor(stored: Any, part: tuple[slice, ...] = ()) -> np.ndarray:
    """Copies a tensor, or a part of the tensor, out of an open file; returns the copy."""
    return stored[part]


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    """Maps names to the tensors in all files of a model's folder; only headers are read.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged or not supported, or if the index contradicts the files.
    """
    files, index = _list_files(folder)
    tensors: dict[str, Tensor] = {}
    file_of: dict[str, str] = {}
    for file in files:
        found = open_file(folder / file)
        if twice := sorted(found.keys() & file_of.keys()):
            raise ValueError(f"{folder}: {file_of[twice[0]]} and {file} both contain {twice[0]}")
        file_of |= dict.fromkeys(found, file)
        tensors |= found
    if index is not None and index != file_of:
        name = min(set(index.items()) ^ set(file_of.items()))[0]
        raise ValueError(f"{folder / INDEX} and the files disagree about tensor {name}")
    return tensors


def _list_files(folder: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
    """Returns the weight files' names, and the index {tensor: file name} (None if absent)."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{folder / INDEX} has no weight_map")
        for name, file in index.items():
            if not isinstance(file, str) or pathlib.PurePath(file).name != file:
                raise ValueError(
                    f"{folder / INDEX}: the file of {name} is {file!r}, not a file name"
                )
        files = sorted(set(index.values()))
        if files != [SINGLE] and (folder / SINGLE).is_file():
            raise ValueError(
                f"{folder} has both {SINGLE}, which transformers reads, and {INDEX}, which names "
                f"{files[0]} and other files: remove one of the two"
            )
        return files, index
    if not (folder / SINGLE).is_file():
        raise FileNotFoundError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    return [SINGLE], None


def write_file(file: pathlib.Path, items: Iterable[tuple[str, Tensor]], dtype: np.dtype) -> None:
    """Writes tensors of one dtype to a safetensors file; only one tensor is in memory at a time.

    A safetensors file begins with the length of the header in eight bytes (little endian). After
    the length come the JSON header and the raw values.
    """
    items = list(items)
    code = next(key for key, value in DTYPES.items() if value == dtype)
    # transformers refuses files without the metadata format=pt.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in items:
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The values begin at a multiple of 8 bytes.
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in items:
            values = tensor.read()
            if (values.dtype, values.shape) != (dtype, tensor.shape):
                found, said = f"{values.dtype} {values.shape}", f"{dtype} {tensor.shape}"
                raise ValueError(f"tensor {name} is {found}, but the header says {said}")
            f.write(np.ascontiguousarray(values).view(np.uint8).data)


def write_folder(
    folder: pathlib.Path, items: Mapping[str, Tensor], dtype: np.dtype, shard_bytes: int
) -> None:
    """Writes tensors in the given order to one file, or to several files with an index.

    Args:
      folder: an existing folder.
      items: the tensors by name.
      dtype: dtype of all tensors.
      shard_bytes: maximum size of the values in one file, in bytes; a larger tensor gets a file of
        its own.
    """
    shards: list[list[tuple[str, Tensor]]] = [[]]
    held = total = 0
    for name, tensor in items.items():
        size = math.prod(tensor.shape) * dtype.itemsize
        if held and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, tensor))
        held, total = held + size, total + size
    if len(shards) == 1:
        return write_file(folder / SINGLE, shards[0], dtype)
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard, dtype)
        index |= {name: file for name, _ in shard}
    return write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
