"""Hugging Face models in and out: config, and one strict table of weight names.

The table maps each of our parameters to its Hugging Face name; reading and writing both use it, so
a name is known to both or to neither. GGUF files arrive here under Hugging Face names (gguf.py).
"""

import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax.model import transformer
from copsd_jax.weights import gguf_files, hf_config, tensor_files

SHARD_BYTES = 5 * 10**9

TOP: dict[tuple[str, ...], str] = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
EMBEDDING, HEAD = TOP["embed", "embedding"], TOP["head", "kernel"]
# Constants that old checkpoints store beside their weights.
NOT_WEIGHTS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

LeafPath = tuple[str, ...]
ReadPart = Callable[[tuple[slice, ...]], np.ndarray]  # the values of a leaf within slices
PlaceLeaf = Callable[[LeafPath, tuple[int, ...], ReadPart], Any]


# Its weights: the table.


class LeafSlice(NamedTuple):
    """A place for one Hugging Face tensor: a leaf of ours, and which layer of it."""

    path: LeafPath
    layer: int | None
    shape: tuple[int, ...]  # Hugging Face's
    transposed: bool  # our kernels are [in, out], theirs [out, in]


def _leaf_shapes(config: transformer.ModelConfig) -> dict[LeafPath, tuple[int, ...]]:
    """Path -> shape of every parameter of the model."""
    flat, _ = jax.tree.flatten_with_path(transformer.abstract_params(config, jnp.float32))
    return {tuple(key.key for key in path): leaf.shape for path, leaf in flat}


def _hf_name(path: LeafPath, layer: int | None) -> str:
    """The name of one tensor of a leaf; a leaf without a name is an error (KeyError)."""
    if layer is None:
        return TOP[path]
    return f"model.layers.{layer}.{BLOCK[path[1]]}.{LEAF[path[2]]}"


def build_weight_table(config: transformer.ModelConfig) -> dict[str, LeafSlice]:
    """Hugging Face name -> slot, for every tensor of the model, in the order of our leaves."""
    out = {}
    for path, shape in _leaf_shapes(config).items():
        stacked = path[0] == "layers"
        transposed = stacked and path[-1] == "kernel"
        own = shape[1:] if stacked else shape
        for layer in range(shape[0]) if stacked else (None,):
            slot = LeafSlice(path, layer, own[::-1] if transposed else own, transposed)
            out[_hf_name(path, layer)] = slot
    return out


# Checks and loading.


def open_tensors(path: pathlib.Path) -> dict[str, tensor_files.Tensor]:
    """Hugging Face name -> tensor of the model at a resolved path; reads headers only.

    Raises:
      FileNotFoundError, ValueError: missing, truncated, contradictory or unsupported files.
    """
    return (
        gguf_files.open_tensors(path) if path.suffix == ".gguf" else tensor_files.open_tensors(path)
    )


def _abbreviate(names: set[str]) -> str:
    """`a, b, c and 5 more`."""
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _check_names_and_shapes(
    found: Mapping[str, tensor_files.Tensor], config: transformer.ModelConfig, path: pathlib.Path
) -> None:
    """Names and shapes, strict both ways; a tied model may store its head a second time."""
    slots = build_weight_table(config)
    if missing := set(slots) - set(found):
        raise ValueError(f"{path} lacks tensors ({len(missing)}): {_abbreviate(missing)}")
    extra = {name for name in set(found) - set(slots) if not NOT_WEIGHTS.fullmatch(name)}
    if config.tie_embeddings:
        extra.discard(HEAD)
    if extra:
        raise ValueError(
            f"{path} has tensors that a {config.family} model of this config has not "
            f"({len(extra)}): {_abbreviate(extra)}"
        )
    wanted = {name: slot.shape for name, slot in slots.items()}
    if config.tie_embeddings and HEAD in found:
        wanted[HEAD] = wanted[EMBEDDING]
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {found[name].shape}, the config wants {shape}"
            )


def check_weights(path: pathlib.Path, config: transformer.ModelConfig) -> None:
    """Refuses a model that `load_params` would refuse, from file sizes and headers, in seconds.

    The one thing that it cannot see is a tied model whose second copy of the head differs.

    Raises:
      FileNotFoundError, ValueError: one sentence with the file and the tensor.
    """
    _check_names_and_shapes(open_tensors(path), config, path)


def _place_on_default_device(_: LeafPath, shape: tuple[int, ...], part: ReadPart) -> jax.Array:
    return jnp.asarray(part(tuple(slice(0, size) for size in shape)))


def load_params(
    path: pathlib.Path,
    config: transformer.ModelConfig,
    dtype: Any,
    put: PlaceLeaf = _place_on_default_device,
) -> dict:
    """The parameter tree, kernels [in, out], layers stacked in the first axis.

    Leaf by leaf, of which `put` reads the parts that it needs: the host holds what `put` keeps and
    one part besides.

    Args:
      path: resolved directory or GGUF.
      config: of `load_config`.
      dtype: of all parameters.
      put: (path of the leaf, its shape, what reads a part of it as a host array of `dtype`) ->
        leaf; the slices of a part have start and stop. The default reads all of it and places it
        on jax's default device.

    Raises:
      FileNotFoundError, ValueError: as `check_weights`; and a tied model whose stored head differs.
    """
    found = open_tensors(path)
    _check_names_and_shapes(found, config, path)
    if (
        config.tie_embeddings
        and HEAD in found
        and not _tensors_equal(found[HEAD], found[EMBEDDING])
    ):
        raise ValueError(f"{path}: tied embeddings, but {HEAD} is not equal to {EMBEDDING}")
    slots: dict[LeafPath, list[tuple[str, LeafSlice]]] = {}
    for name, slot in build_weight_table(config).items():
        slots.setdefault(slot.path, []).append((name, slot))
    params: dict = {}
    for leaf, shape in _leaf_shapes(config).items():
        node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), leaf[:-1], params)
        node[leaf[-1]] = put(
            leaf, shape, functools.partial(_read_leaf_part, found, slots[leaf], np.dtype(dtype))
        )
    return params


def _tensors_equal(one: tensor_files.Tensor, other: tensor_files.Tensor) -> bool:
    """Whether two stored tensors are equal, 1024 rows at a time."""
    cuts = [(slice(row, row + 1024), slice(None)) for row in range(0, one.shape[0], 1024)]
    return all(np.array_equal(one.read(cut), other.read(cut)) for cut in cuts)


def _read_leaf_part(
    found: Mapping, slots: list[tuple[str, LeafSlice]], dtype: np.dtype, cuts: tuple[slice, ...]
) -> np.ndarray:
    """The values of a leaf within slices, of each of its tensors no more than that."""
    values = np.empty([cut.stop - cut.start for cut in cuts], dtype)
    if slots[0][1].layer is None:
        values[...] = found[slots[0][0]].read(cuts)
        return values
    layers, *own = cuts
    for into, (name, slot) in zip(values, slots[layers], strict=True):
        if slot.transposed:
            into[...] = found[name].read(tuple(own[::-1])).T
        else:
            into[...] = found[name].read(tuple(own))
    return values


# Saving.


def _export_tensors(
    params: dict, config: transformer.ModelConfig
) -> dict[str, tensor_files.Tensor]:
    """Every tensor under its Hugging Face name; a leaf is fetched to the host once, in its turn."""
    flat = {
        tuple(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
    expected = _leaf_shapes(config)
    if {path: leaf.shape for path, leaf in flat.items()} != expected:
        wrong = sorted(set(flat) ^ set(expected)) or "a shape"
        raise ValueError(f"the parameters are not those of this config: {wrong}")
    host = functools.lru_cache(maxsize=1)(lambda path: np.asarray(flat[path]))

    def read(slot: LeafSlice) -> np.ndarray:
        values = host(slot.path) if slot.layer is None else host(slot.path)[slot.layer]
        return values.T if slot.transposed else values

    return {
        name: tensor_files.Tensor(slot.shape, functools.partial(read, slot))
        for name, slot in build_weight_table(config).items()
    }


def _write_json(file: pathlib.Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
    """The tokenizer's files, under the class name that both transformers 4 and 5 know."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    raw = tensor_files.read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(file, raw)


def save(
    directory: str | os.PathLike,
    params: dict,
    config: transformer.ModelConfig,
    *,
    source_path: pathlib.Path,
    tokenizer: Any,
    shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
    """Writes a Hugging Face folder that transformers loads; returns it.

    It is built beside the target and renamed, so that a folder of this name is always whole.

    Args:
      directory: absent or empty.
      params: tree of `load_params`, all leaves of one number type, which the files keep.
      config: shape of the parameters.
      source_path: the resolved path that the model came from; its generation settings are kept.
      tokenizer: of `tokenizer.load`.
      shard_bytes: size of the values above which the weights go into several files.

    Raises:
      FileExistsError: the directory exists and is not empty.
      ValueError: the parameters do not fit the config, or are of mixed or unsupported types.
    """
    target = pathlib.Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty")
    dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
    if len(dtypes) != 1 or dtypes - set(tensor_files.DTYPES.values()):
        raise ValueError(f"parameters of {sorted(map(str, dtypes))}; one float type is needed")
    dtype = dtypes.pop()
    outgoing = _export_tensors(params, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _save_tokenizer(partial, tokenizer)
    tensor_files.write_folder(partial, outgoing, dtype, shard_bytes)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _write_json(partial / "config.json", hf_config.to_config_json(config, str(dtype), ids))
    stops = sorted({*hf_config.read_stop_ids(source_path), tokenizer.eos_token_id} - {None})
    _write_json(partial / "generation_config.json", _generation(source_path, ids, stops))
    if target.exists():
        target.rmdir()  # empty, as checked
    return partial.rename(target)


def _generation(source: pathlib.Path, ids: Mapping[str, Any], stops: list[int]) -> dict:
    """The source's generation settings with every stop id."""
    file = source / "generation_config.json"
    own = tensor_files.read_json(file) if source.is_dir() and file.is_file() else {}
    return {**ids, **own, "eos_token_id": stops}
