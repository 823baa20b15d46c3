"""Import and export of Hugging Face weights, based on one strict table of names (names.py).

The table maps each Hugging Face name to a slice of one of our parameters. Reading and writing use
the same table, so both accept the same names. The module gguf_files.py gives the tensors of a GGUF
file their Hugging Face names. The module hf_config.py reads and writes configs.
"""

import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from copsd_jax.model import transformer
from copsd_jax.weights import gguf_files, hf_config, names, tensor_files

STRIP_ROWS = 64  # number of rows that are read at once from a stored matrix
SHARD_BYTES = 5 * 10**9  # maximum size of the values in one file, in bytes

LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
EMBEDDING, HEAD = names.TOP["embed", "embedding"][0], names.TOP["head", "kernel"][0]
# Constants that old checkpoints store in addition to their weights.
NOT_WEIGHTS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

Tensors = dict[str, tensor_files.Tensor]  # Hugging Face name -> tensor
LeafPath = tuple[str, ...]  # for example ("layers", "q", "kernel")
# Reads the part of a leaf that is given by one slice for each axis.
ReadPart = Callable[[tuple[slice, ...]], np.ndarray]
PlaceLeaf = Callable[[LeafPath, tuple[int, ...], ReadPart], jax.Array]


# --- the table --------------------------------------------------------------------------------


class LeafSlice(NamedTuple):
    """The part of a leaf in our tree that corresponds to one Hugging Face tensor."""

    path: LeafPath
    layer: int | None  # index along the first axis of a stacked leaf; None for other leaves
    shape: tuple[int, ...]  # shape of the Hugging Face tensor
    transposed: bool  # True for kernels in layers: [in, out] in our tree, [out, in] in Hugging Face


def _leaf_shapes(config: transformer.ModelConfig) -> dict[LeafPath, tuple[int, ...]]:
    """Returns the shapes of a model's parameters as {path: shape}."""
    leaves = _map_weight_paths(transformer.abstract_params(config, jnp.float32))
    return {path: leaf.shape for path, leaf in leaves.items()}


def _map_weight_paths(params: dict) -> dict[LeafPath, Any]:
    """Returns the leaves of a tree as {path: leaf}."""
    leaves = jax.tree.leaves_with_path(params)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _to_hf_name(path: LeafPath, layer: int | None) -> str:
    """Returns the Hugging Face name of a leaf's tensor; raises KeyError for an unknown leaf."""
    if layer is None:
        return names.TOP[path][0]
    return f"model.layers.{layer}.{names.BLOCK[path[1]][0]}.{LEAF[path[2]]}"


def build_weight_table(config: transformer.ModelConfig) -> dict[str, LeafSlice]:
    """Maps each Hugging Face tensor name to its `LeafSlice`, in the order of our leaves."""
    table = {}
    for path, shape in _leaf_shapes(config).items():
        stacked = path[0] == "layers"
        transposed = stacked and path[-1] == "kernel"
        own = shape[1:] if stacked else shape
        for layer in range(shape[0]) if stacked else (None,):
            entry = LeafSlice(path, layer, own[::-1] if transposed else own, transposed)
            table[_to_hf_name(path, layer)] = entry
    return table


# --- checking and loading ---------------------------------------------------------------------


def open_tensors(path: pathlib.Path) -> Tensors:
    """Maps Hugging Face names to a model's tensors; reads only the headers of the files.

    Args:
      path: a folder or a GGUF file, as returned by `hub.resolve_model_path`.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is truncated or not supported, or if files contradict each other.
    """
    if path.suffix == ".gguf":
        return gguf_files.open_tensors(path)
    return tensor_files.open_folder(path)


def _abbreviate(tensors: set[str]) -> str:
    """Formats names as `a, b, c and 5 more`."""
    first = ", ".join(sorted(tensors)[:3])
    return first if len(tensors) <= 3 else f"{first} and {len(tensors) - 3} more"


def check_weights(path: pathlib.Path, config: transformer.ModelConfig) -> None:
    """Checks that a model's files contain exactly the expected tensors.

    Only file sizes and headers are read, so this check takes only seconds. If a model with tied
    embeddings stores a head, the head must equal the embeddings, so both are read.

    Args:
      path: a folder or a GGUF file, as returned by `hub.resolve_model_path`.
      config: config of the model.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the stored tensors do not match the config, or if tied embeddings differ from a
        stored head; the message names the path and the tensors.
    """
    found = _match_tensors(path, config)
    twice = config.tie_embeddings and HEAD in found
    if twice and not _tensors_equal(found[HEAD], found[EMBEDDING]):
        raise ValueError(
            f"{path}: the embeddings are tied, but {HEAD} differs from {EMBEDDING}: set "
            "tie_word_embeddings in config.json to false if this head is right, or remove the head"
        )


def _match_tensors(path: pathlib.Path, config: transformer.ModelConfig) -> Tensors:
    """Opens a model's files, and compares the names and shapes in their headers with the config."""
    found = open_tensors(path)
    wanted = {name: entry.shape for name, entry in build_weight_table(config).items()}
    if missing := set(wanted) - set(found):
        raise ValueError(f"{path} lacks tensors ({len(missing)}): {_abbreviate(missing)}")
    if config.tie_embeddings and HEAD in found:
        wanted[HEAD] = wanted[EMBEDDING]
    extra = {name for name in set(found) - set(wanted) if not NOT_WEIGHTS.fullmatch(name)}
    if extra:
        raise ValueError(
            f"{path} has tensors ({len(extra)}) that a {config.family} model with this config does "
            f"not have: {_abbreviate(extra)}"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {found[name].shape}; the config needs {shape}"
            )
    return found


def _place_on_default_device(_: LeafPath, shape: tuple[int, ...], read: ReadPart) -> jax.Array:
    return jnp.asarray(read(tuple(slice(0, size) for size in shape)))


def load_params(
    path: pathlib.Path, config: transformer.ModelConfig, dtype: Any,
    place: PlaceLeaf = _place_on_default_device,
) -> dict:  # fmt: skip
    """Loads the parameter tree; kernels are [in, out], and layers are stacked along the first axis.

    If the embeddings are tied, a stored head is not read here. `check_weights` compares such a head
    with the embeddings.

    Leaves are read one at a time, and `place` decides which parts of a leaf are read. At any time,
    host memory holds only one part of a leaf in addition to the arrays that `place` keeps.

    Args:
      path: a folder or a GGUF file, as returned by `hub.resolve_model_path`.
      config: config of the model.
      dtype: dtype of all parameters.
      place: function that returns a leaf; it is called as `place(path, shape, read)` with the
        leaf's path and shape. `read` takes one slice per axis, with explicit start and stop, and
        returns the selected part of the leaf in `dtype`. By default, the whole leaf is put on JAX's
        default device.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the stored tensors do not match the config.
    """
    found = _match_tensors(path, config)
    entries: dict[LeafPath, list[tuple[str, LeafSlice]]] = {}
    for name, entry in build_weight_table(config).items():
        entries.setdefault(entry.path, []).append((name, entry))
    params: dict = {}
    for leaf, shape in _leaf_shapes(config).items():
        node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), leaf[:-1], params)
        read = functools.partial(_read_leaf_part, found, entries[leaf], np.dtype(dtype))
        node[leaf[-1]] = place(leaf, shape, read)
    return params


def _tensors_equal(one: tensor_files.Tensor, other: tensor_files.Tensor) -> bool:
    """Returns whether two stored matrices are equal; the matrices are read in strips of rows."""
    rows, columns = one.shape
    parts = [(strip, slice(0, columns)) for strip in _split_weight_rows(0, rows)]
    return all(np.array_equal(one.read(part), other.read(part)) for part in parts)


def _read_leaf_part(
    found: Tensors, entries: list[tuple[str, LeafSlice]], dtype: np.dtype, part: tuple[slice, ...]
) -> np.ndarray:
    """Returns the part of a leaf that the slices select; reads only this part of the tensors."""
    name, entry = entries[0]
    if entry.layer is None:
        values = found[name].read(part)
        # A read-only array is a view of a mapped file, and is copied because the file may change
        # later.
        return values.astype(dtype, copy=not values.flags.writeable)
    values = np.empty([cut.stop - cut.start for cut in part], dtype)
    layers, *own = part
    for layer_values, (name, entry) in zip(values, entries[layers], strict=True):
        into = layer_values.T if entry.transposed else layer_values
        rows, *others = own[::-1] if entry.transposed else own
        for strip in _split_weight_rows(rows.start, rows.stop):
            here = slice(strip.start - rows.start, strip.stop - rows.start)
            into[here] = found[name].read((strip, *others))
    return values


def _split_weight_rows(start: int, stop: int) -> list[slice]:
    """Splits rows into strips; reading one strip at a time takes little additional memory."""
    return [slice(row, min(row + STRIP_ROWS, stop)) for row in range(start, stop, STRIP_ROWS)]


# --- saving -----------------------------------------------------------------------------------


def export_tensors(params: dict, config: transformer.ModelConfig) -> Tensors:
    """Maps Hugging Face names to tensors; reading a tensor fetches its leaf to the host.

    The cache holds only one leaf. Each leaf is nevertheless fetched only once, because the map
    lists all tensors of a leaf one after another.
    """
    leaves = _map_weight_paths(params)
    expected = _leaf_shapes(config)
    if {path: leaf.shape for path, leaf in leaves.items()} != expected:
        wrong = sorted(set(leaves) ^ set(expected)) or "a shape"
        raise ValueError(f"the parameters do not match the config: {wrong}")
    fetch = functools.lru_cache(maxsize=1)(lambda path: np.asarray(leaves[path]))

    def read(entry: LeafSlice) -> np.ndarray:
        values = fetch(entry.path)
        values = values if entry.layer is None else values[entry.layer]
        return values.T if entry.transposed else values

    return {
        name: tensor_files.Tensor(entry.shape, functools.partial(read, entry))
        for name, entry in build_weight_table(config).items()
    }


def save_tokenizer(folder: pathlib.Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Writes tokenizer files with a class name that both transformers 4 and transformers 5 know."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    raw = tensor_files.read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    tensor_files.write_json(file, raw)


def save(
    directory: str | os.PathLike, params: dict, config: transformer.ModelConfig, *,
    source_path: pathlib.Path, tokenizer: transformers.PreTrainedTokenizerBase,
    stop_ids: Iterable[int] = (), shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:  # fmt: skip
    """Writes a Hugging Face folder that transformers can load; returns the folder's path.

    The folder gets the name `directory` only when its files are complete (see
    `tensor_files.create_weights_folder`). For the other arguments, see `write_files`.

    Raises:
      FileExistsError: if the directory exists and is not an empty folder.
      ValueError: if the parameters do not fit the config, have different dtypes, or have an
        unsupported dtype.
    """
    with tensor_files.create_weights_folder(pathlib.Path(directory)) as folder:
        write_files(
            folder, params, config, source_path=source_path, tokenizer=tokenizer,
            stop_ids=stop_ids, shard_bytes=shard_bytes,
        )  # fmt: skip
    return pathlib.Path(directory)


def write_files(
    folder: pathlib.Path, params: dict, config: transformer.ModelConfig, *,
    source_path: pathlib.Path, tokenizer: transformers.PreTrainedTokenizerBase,
    stop_ids: Iterable[int] = (), shard_bytes: int = SHARD_BYTES, dtype: Any = None,
) -> None:  # fmt: skip
    """Writes the files of a model that transformers can load to an existing folder.

    Args:
      folder: the folder.
      params: tree of parameters, as returned by `load_params`. All leaves must have the same dtype.
      config: config of the model.
      source_path: the resolved path of the original model. The saved folder keeps the generation
        settings of the original model.
      tokenizer: the tokenizer, from `tokenizer.load`.
      stop_ids: ids that end a text, besides the stop ids of the original model and the tokenizer.
      shard_bytes: maximum size of the values in one file, in bytes; larger models are split into
        several files.
      dtype: the dtype in the files; None for the dtype of the parameters.

    Raises:
      ValueError: if the parameters do not fit the config, have different dtypes, or have an
        unsupported dtype, or if `dtype` cannot hold a value.
    """
    dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
    if len(dtypes) != 1 or dtypes - set(tensor_files.DTYPES.values()):
        raise ValueError(f"parameters have dtypes {sorted(map(str, dtypes))}; use one float type")
    dtype = np.dtype(dtypes.pop() if dtype is None else dtype)
    tensors = {
        name: tensor_files.convert_dtype(name, tensor, dtype)
        for name, tensor in export_tensors(params, config).items()
    }
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {key: getattr(tokenizer, key) for key in keys}
    files = {
        "config.json": hf_config.to_config_json(config, str(dtype), ids),
        "generation_config.json": hf_config.to_generation_json(source_path, ids, stop_ids),
    }
    save_tokenizer(folder, tokenizer)
    tensor_files.write_folder(folder, tensors, dtype, shard_bytes)
    for name, content in files.items():
        tensor_files.write_json(folder / name, content)


def fingerprint_weight_files(path: pathlib.Path) -> str:
    """Returns one SHA-256 (hex) of the name, size, first MiB and last MiB of every weight file.

    Args:
      path: a weight file, or a folder with safetensors files.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()
