"""Hugging Face models in and out: config, and one strict table of weight names.

The table maps each of our parameters to its Hugging Face name; reading and writing both use it, so
a name is known to both or to neither. GGUF files arrive here under Hugging Face names (gguf.py).
"""

import dataclasses
import functools
import json
import math
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
from copsd_jax.weights import gguf, hub, safetensors

ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}
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

Path = tuple[str, ...]
Part = Callable[[tuple[slice, ...]], np.ndarray]  # the values of a leaf within slices
Put = Callable[[Path, tuple[int, ...], Part], Any]


resolve = hub.resolve  # so that all about a model is found under hf


# Its shape.


def _family(raw: Mapping, file: pathlib.Path) -> str:
    names = raw.get("architectures") or [f"model_type {raw.get('model_type')!r}"]
    if names[0] not in ARCHITECTURES:
        raise ValueError(
            f"{file}: architecture {names[0]} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[names[0]]


def _refuse_options(raw: Mapping, file: pathlib.Path) -> None:
    """Options of supported architectures that change the computation in ways not built here."""
    only = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "partial_rotary_factor": (1.0,),
        "quantization_config": (),
    }
    for key, allowed in only.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            choices = " or ".join(map(repr, allowed)) or "none"
            raise ValueError(f"{file}: {key} = {raw[key]!r} is not supported, only {choices}")
    for kind in raw.get("layer_types") or ():
        if kind != "full_attention":
            raise ValueError(f"{file}: layer type {kind} is not supported, only full_attention")


def _rope(raw: Mapping, file: pathlib.Path) -> tuple[float, transformer.RopeScaling | None]:
    """Base and scaling: transformers 5's rope_parameters, or 4's rope_theta and rope_scaling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f"{file}: RoPE type {kind!r} is not supported, only default and llama3")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in keys if key not in rope]
    if missing:
        raise ValueError(f"{file}: RoPE type llama3 lacks {', '.join(missing)}")
    factor, low, high = (float(rope[key]) for key in keys[:3])
    return float(theta), transformer.RopeScaling(factor, low, high, int(rope[keys[3]]))


def load_config(path: pathlib.Path) -> transformer.ModelConfig:
    """The shape of the model at a resolved path: a directory with config.json, or a GGUF.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: unreadable, or an architecture or option that is not supported, by name.
    """
    config = gguf.config(path) if path.suffix == ".gguf" else _folder_config(path)
    _check_numbers(config, path)
    return config


def _check_numbers(config: transformer.ModelConfig, path: pathlib.Path) -> None:
    """Sizes that no model has come from damaged files, and would fail far from here."""
    c = dataclasses.asdict(config)
    for key in ("vocab_size", "d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "head_dim"):
        if not (isinstance(c[key], int) and 0 < c[key] < 10**7):
            raise ValueError(f"{path}: the config's {key} is {c[key]!r}")
    for key in ("rope_theta", "rms_eps"):
        if not (isinstance(c[key], int | float) and 0 < c[key] < math.inf):
            raise ValueError(f"{path}: the config's {key} is {c[key]!r}")
    if config.n_heads % config.n_kv_heads or config.head_dim % 2 or config.n_layers > 1000:
        raise ValueError(
            f"{path}: the config's {config.n_layers} layers of {config.n_heads} heads and "
            f"{config.n_kv_heads} key heads of size {config.head_dim} do not make a model"
        )


def _folder_config(path: pathlib.Path) -> transformer.ModelConfig:
    file = path / "config.json"
    raw = safetensors.read_json(file)
    family = _family(raw, file)
    _refuse_options(raw, file)
    theta, scaling = _rope(raw, file)
    needed = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings"),
    )
    missing = [key for key in needed if key not in raw]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    heads = raw["num_attention_heads"]
    return transformer.ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        d_model=raw["hidden_size"],
        d_ff=raw["intermediate_size"],
        n_layers=raw["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=raw.get("rms_norm_eps", 1e-6),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_position=raw["max_position_embeddings"],
    )


def generation_stops(path: pathlib.Path) -> list[int]:
    """Every end-of-text id of generation_config.json and config.json, or of a GGUF; sorted.

    Absent files add nothing: a tokenizer's folder has neither.
    """
    if path.suffix == ".gguf":
        fields = gguf.metadata(path)
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = [fields.get(f"tokenizer.ggml.{key}") for key in keys]
    else:
        files = [path / name for name in hub.CONFIG_FILES]
        found = [
            safetensors.read_json(file).get("eos_token_id") for file in files if file.is_file()
        ]
    ids = [i for entry in found for i in (entry if isinstance(entry, list) else [entry])]
    return sorted({int(i) for i in ids if i is not None})


# Its weights: the table.


class Slot(NamedTuple):
    """A place for one Hugging Face tensor: a leaf of ours, and which layer of it."""

    path: Path
    layer: int | None
    shape: tuple[int, ...]  # Hugging Face's
    transposed: bool  # our kernels are [in, out], theirs [out, in]


def _leaves(config: transformer.ModelConfig) -> dict[Path, tuple[int, ...]]:
    """Path -> shape of every parameter of the model."""
    flat, _ = jax.tree.flatten_with_path(transformer.abstract(config, jnp.float32))
    return {tuple(key.key for key in path): leaf.shape for path, leaf in flat}


def _hf_name(path: Path, layer: int | None) -> str:
    """The name of one tensor of a leaf; a leaf without a name is an error (KeyError)."""
    if layer is None:
        return TOP[path]
    return f"model.layers.{layer}.{BLOCK[path[1]]}.{LEAF[path[2]]}"


def table(config: transformer.ModelConfig) -> dict[str, Slot]:
    """Hugging Face name -> slot, for every tensor of the model, in the order of our leaves."""
    out = {}
    for path, shape in _leaves(config).items():
        stacked = path[0] == "layers"
        transposed = stacked and path[-1] == "kernel"
        own = shape[1:] if stacked else shape
        for layer in range(shape[0]) if stacked else (None,):
            slot = Slot(path, layer, own[::-1] if transposed else own, transposed)
            out[_hf_name(path, layer)] = slot
    return out


# Checks and loading.


def tensors(path: pathlib.Path) -> dict[str, safetensors.Tensor]:
    """Hugging Face name -> tensor of the model at a resolved path; reads headers only.

    Raises:
      FileNotFoundError, ValueError: missing, truncated, contradictory or unsupported files.
    """
    return gguf.tensors(path) if path.suffix == ".gguf" else safetensors.tensors(path)


def _some(names: set[str]) -> str:
    """`a, b, c and 5 more`."""
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _match(
    found: Mapping[str, safetensors.Tensor], config: transformer.ModelConfig, path: pathlib.Path
) -> None:
    """Names and shapes, strict both ways; a tied model may store its head a second time."""
    slots = table(config)
    if missing := set(slots) - set(found):
        raise ValueError(f"{path} lacks tensors ({len(missing)}): {_some(missing)}")
    extra = {name for name in set(found) - set(slots) if not NOT_WEIGHTS.fullmatch(name)}
    if config.tie_embeddings:
        extra.discard(HEAD)
    if extra:
        raise ValueError(
            f"{path} has tensors that a {config.family} model of this config has not "
            f"({len(extra)}): {_some(extra)}"
        )
    wanted = {name: slot.shape for name, slot in slots.items()}
    if config.tie_embeddings and HEAD in found:
        wanted[HEAD] = wanted[EMBEDDING]
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{path}: tensor {name} has shape {found[name].shape}, the config wants {shape}"
            )


def check(path: pathlib.Path, config: transformer.ModelConfig) -> None:
    """Refuses a model that `load_params` would refuse, from file sizes and headers, in seconds.

    The one thing that it cannot see is a tied model whose second copy of the head differs.

    Raises:
      FileNotFoundError, ValueError: one sentence with the file and the tensor.
    """
    _match(tensors(path), config, path)


def _place(_: Path, shape: tuple[int, ...], part: Part) -> jax.Array:
    return jnp.asarray(part(tuple(slice(0, size) for size in shape)))


def load_params(
    path: pathlib.Path, config: transformer.ModelConfig, dtype: Any, put: Put = _place
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
      FileNotFoundError, ValueError: as `check`; and a tied model whose stored head differs.
    """
    found = tensors(path)
    _match(found, config, path)
    if config.tie_embeddings and HEAD in found and not _equal(found[HEAD], found[EMBEDDING]):
        raise ValueError(f"{path}: tied embeddings, but {HEAD} is not equal to {EMBEDDING}")
    slots: dict[Path, list[tuple[str, Slot]]] = {}
    for name, slot in table(config).items():
        slots.setdefault(slot.path, []).append((name, slot))
    params: dict = {}
    for leaf, shape in _leaves(config).items():
        node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), leaf[:-1], params)
        node[leaf[-1]] = put(
            leaf, shape, functools.partial(_part, found, slots[leaf], np.dtype(dtype))
        )
    return params


def _equal(one: safetensors.Tensor, other: safetensors.Tensor) -> bool:
    """Whether two stored tensors are equal, 1024 rows at a time."""
    cuts = [(slice(row, row + 1024), slice(None)) for row in range(0, one.shape[0], 1024)]
    return all(np.array_equal(one.read(cut), other.read(cut)) for cut in cuts)


def _part(
    found: Mapping, slots: list[tuple[str, Slot]], dtype: np.dtype, cuts: tuple[slice, ...]
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


def _outgoing(params: dict, config: transformer.ModelConfig) -> dict[str, safetensors.Tensor]:
    """Every tensor under its Hugging Face name; a leaf is fetched to the host once, in its turn."""
    flat = {
        tuple(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
    expected = _leaves(config)
    if {path: leaf.shape for path, leaf in flat.items()} != expected:
        wrong = sorted(set(flat) ^ set(expected)) or "a shape"
        raise ValueError(f"the parameters are not those of this config: {wrong}")
    host = functools.lru_cache(maxsize=1)(lambda path: np.asarray(flat[path]))

    def read(slot: Slot) -> np.ndarray:
        values = host(slot.path) if slot.layer is None else host(slot.path)[slot.layer]
        return values.T if slot.transposed else values

    return {
        name: safetensors.Tensor(slot.shape, functools.partial(read, slot))
        for name, slot in table(config).items()
    }


def _config_json(config: transformer.ModelConfig, dtype: str, ids: Mapping[str, Any]) -> dict:
    """config.json in the layouts of transformers 4 and 5 at once."""
    architecture = next(name for name, family in ARCHITECTURES.items() if family == config.family)
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,  # of o as well; Qwen2's biases of q, k, v go without saying
        "use_sliding_window": False,
        "torch_dtype": dtype,
        "dtype": dtype,
        **ids,
    }


def _write_json(file: pathlib.Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
    """The tokenizer's files, under the class name that both transformers 4 and 5 know."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    raw = safetensors.read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
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
    if len(dtypes) != 1 or dtypes - set(safetensors.DTYPES.values()):
        raise ValueError(f"parameters of {sorted(map(str, dtypes))}; one float type is needed")
    dtype = dtypes.pop()
    outgoing = _outgoing(params, config)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    _save_tokenizer(partial, tokenizer)
    safetensors.write_folder(partial, outgoing, dtype, shard_bytes)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    _write_json(partial / "config.json", _config_json(config, str(dtype), ids))
    stops = sorted({*generation_stops(source_path), tokenizer.eos_token_id} - {None})
    _write_json(partial / "generation_config.json", _generation(source_path, ids, stops))
    if target.exists():
        target.rmdir()  # empty, as checked
    return partial.rename(target)


def _generation(source: pathlib.Path, ids: Mapping[str, Any], stops: list[int]) -> dict:
    """The source's generation settings with every stop id."""
    file = source / "generation_config.json"
    own = safetensors.read_json(file) if source.is_dir() and file.is_file() else {}
    return {**ids, **own, "eos_token_id": stops}
