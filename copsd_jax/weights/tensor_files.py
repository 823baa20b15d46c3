"""safetensors files in and out, tensor by tensor.

The format is eight bytes of header length (little endian), a JSON header (name -> dtype, shape,
data_offsets) and the raw values. Reading it directly lets checks end before any weight is read, and
lets tensors stream from a memory map in every number type, bfloat16 included.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """One stored tensor: its shape, and how to read it.

    `read()` gives all of it. Of a tensor in a file `read(part)` gives the values within slices, one
    for each axis, and fetches little else.
    """

    shape: tuple[int, ...]
    read: Callable[..., np.ndarray]


def read_json(file: pathlib.Path) -> dict:
    """The JSON object of a file.

    Raises:
      FileNotFoundError, ValueError: absent, or not a JSON object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object")
    return value


def header(file: pathlib.Path) -> tuple[int, dict[str, dict]]:
    """(offset of the values, name -> dtype, shape, data_offsets).

    Raises:
      FileNotFoundError, ValueError: absent, truncated or damaged, or an unsupported number type.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{file} is truncated or no safetensors file ({size} bytes)")
        try:
            entries = json.loads(f.read(length))
        except ValueError as error:
            raise ValueError(f"{file} has a damaged safetensors header: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file} has a damaged safetensors header: not an object")
    entries.pop("__metadata__", None)
    start = 8 + length
    end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size:
        state = "truncated" if size < end else "longer than its header says"
        raise ValueError(f"{file} is {state}: {size} bytes, {end} expected")
    for name, entry in entries.items():
        _check_entry(file, name, entry)
    return start, entries


def _check_entry(file: pathlib.Path, name: str, entry: Mapping) -> None:
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{file}: tensor {name} has type {entry['dtype']}, which is not supported; supported "
            f"are {', '.join(DTYPES)}"
        )
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
        raise ValueError(f"{file}: tensor {name} has {end - begin} bytes for {entry['shape']}")


def _read(
    file: pathlib.Path, start: int, entry: Mapping, part: tuple[slice, ...] = ()
) -> np.ndarray:
    """One tensor or a part, as a view of a memory map that lives as long as the view."""
    begin, end = entry["data_offsets"]
    raw = np.memmap(file, np.uint8, "r", start + begin, (end - begin,))
    return np.frombuffer(raw, DTYPES[entry["dtype"]]).reshape(entry["shape"])[part]


def _shards(folder: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the files, and the index (tensor -> file name) if there is one."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map")
        return sorted(set(index.values())), index
    if not (folder / SINGLE).is_file():
        raise FileNotFoundError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")
    return [SINGLE], None


def open_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
    """Name -> tensor of a model's folder, one file or sharded; reads headers only.

    Raises:
      FileNotFoundError, ValueError: missing, truncated, contradictory or unsupported files.
    """
    files, index = _shards(folder)
    out: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for file in files:
        start, entries = header(folder / file)
        for name, entry in entries.items():
            if name in where:
                raise ValueError(f"{folder}: tensor {name} is in {where[name]} and in {file}")
            where[name] = file
            read = functools.partial(_read, folder / file, start, entry)
            out[name] = Tensor(tuple(entry["shape"]), read)
    if index is not None and index != where:
        name = min(set(index.items()) ^ set(where.items()))[0]
        raise ValueError(f"{folder / INDEX} and the files disagree about tensor {name}")
    return out


def write_file(file: pathlib.Path, items: Iterable[tuple[str, Tensor]], dtype: np.dtype) -> None:
    """Writes tensors, all of one number type, reading each when its turn comes."""
    items = list(items)
    code = next(key for key, value in DTYPES.items() if value == dtype)
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers wants the format
    end = 0
    for name, tensor in items:
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        entries[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in items:
            values = tensor.read()
            if values.dtype != dtype or values.shape != tensor.shape:
                raise ValueError(f"{name} is {values.dtype} {values.shape}, not {dtype}")
            f.write(np.ascontiguousarray(values).view(np.uint8).data)


def write_folder(
    folder: pathlib.Path, items: Mapping[str, Tensor], dtype: np.dtype, shard_bytes: int
) -> None:
    """One file, or, above `shard_bytes` of values, several and an index; in the order of items."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    held, total = 0, 0
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
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    return None
