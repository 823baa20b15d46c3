"""Import and export of Hugging Face configs and end-of-text ids.

The module gguf_files.py reads the configs of GGUF files; `load_config` checks these configs too.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from copsd_jax.model import transformer
from copsd_jax.weights import gguf_files, hub, tensor_files

ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}
NEEDED = {  # field of ModelConfig -> its key in config.json
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "max_position": "max_position_embeddings",
}
ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _find_family(raw: Mapping, file: pathlib.Path) -> str:
    name = (raw.get("architectures") or [f"model_type {raw.get('model_type')!r}"])[0]
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{file}: architecture {name} is not supported (supported: {known})")
    return ARCHITECTURES[name]


def _check_hf_options(raw: Mapping, file: pathlib.Path) -> None:
    """Checks options that change the computation; raises ValueError if a value is unsupported."""
    only = {"hidden_act": ("silu",), "partial_rotary_factor": (1.0,), "quantization_config": ()}
    only |= dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window"), (False,))
    for key, allowed in only.items():
        if raw.get(key) is not None and raw[key] not in allowed:
            choices = " or ".join(map(repr, allowed)) or "none"
            raise ValueError(f"{file}: {key} = {raw[key]!r} is not supported (allowed: {choices})")
    for kind in raw.get("layer_types") or ():
        if kind != "full_attention":
            raise ValueError(f"{file}: layer type {kind} is not supported (only full_attention is)")


def _read_hf_rope(raw: Mapping, file: pathlib.Path) -> tuple[float, transformer.RopeScaling | None]:
    """Reads RoPE's base and scaling from a config in the layout of transformers 4 or 5.

    Version 5 of transformers uses rope_parameters; version 4 uses rope_theta and rope_scaling.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f"{file}: RoPE type {kind!r} is not supported (allowed: default, llama3)")
    if missing := [key for key in ROPE_KEYS if key not in rope]:
        raise ValueError(f"{file}: RoPE type llama3 also needs {', '.join(missing)}")
    factor, low, high, positions = (float(rope[key]) for key in ROPE_KEYS)
    return float(theta), transformer.RopeScaling(factor, low, high, int(positions))


def load_config(path: pathlib.Path) -> transformer.ModelConfig:
    """Loads the config of a model.

    Args:
      path: a GGUF file or a folder with config.json, as returned by `hub.resolve_model_path`.

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if the config cannot be read, or if its architecture or an option is unsupported.
    """
    config = gguf_files.load_config(path) if path.suffix == ".gguf" else _load_folder_config(path)
    _check_model_sizes(config, path)
    return config


def _check_model_sizes(config: transformer.ModelConfig, path: pathlib.Path) -> None:
    """Checks the numbers in a config; raises ValueError for impossible numbers.

    The config in a damaged file can contain impossible numbers. Without `_check_model_sizes`, an
    impossible number would cause an error elsewhere.
    """
    c = dataclasses.asdict(config)
    for key in ("vocab_size", "d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "head_dim"):
        if not (isinstance(c[key], int) and 0 < c[key] < 10**7):
            raise ValueError(f"{path}: the config has an impossible {key}: {c[key]!r}")
    for key in ("rope_theta", "rms_eps"):
        if not (isinstance(c[key], int | float) and 0 < c[key] < math.inf):
            raise ValueError(f"{path}: the config has an impossible {key}: {c[key]!r}")
    if config.n_heads % config.n_kv_heads or config.head_dim % 2 or config.n_layers > 1000:
        raise ValueError(
            f"{path}: no model has {config.n_layers} layers with {config.n_heads} heads and "
            f"{config.n_kv_heads} key heads of size {config.head_dim}"
        )


def _load_folder_config(path: pathlib.Path) -> transformer.ModelConfig:
    file = path / "config.json"
    raw = tensor_files.read_json(file)
    family = _find_family(raw, file)
    _check_hf_options(raw, file)
    theta, scaling = _read_hf_rope(raw, file)
    if missing := [key for key in NEEDED.values() if key not in raw]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    heads = raw["num_attention_heads"]
    return transformer.ModelConfig(
        **{field: raw[key] for field, key in NEEDED.items()},
        family=family, rope_theta=theta, rope_scaling=scaling,
        n_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rms_eps=raw.get("rms_norm_eps", 1e-6), tie_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
    )  # fmt: skip


def read_stop_ids(path: pathlib.Path) -> list[int]:
    """Reads the end-of-text ids from generation_config.json and config.json, or from a GGUF file.

    Missing config files are skipped, because a folder with only a tokenizer has no config files.

    Args:
      path: a folder or a GGUF file, as returned by `hub.resolve_model_path`.

    Returns:
      The ids in ascending order, without duplicates; the list may be empty.
    """
    if path.suffix == ".gguf":
        fields = gguf_files.read_header(path).metadata
        found = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    else:
        files = [path / name for name in hub.CONFIG_FILES if (path / name).is_file()]
        found = [tensor_files.read_json(file).get("eos_token_id") for file in files]
    ids = [i for entry in found for i in (entry if isinstance(entry, list) else [entry])]
    return sorted({int(i) for i in ids if i is not None})


def to_config_json(config: transformer.ModelConfig, dtype: str, ids: Mapping[str, Any]) -> dict:
    """Returns the content of config.json, with the keys for both transformers 4 and transformers 5.

    Args:
      config: config of the model.
      dtype: name of the weights' dtype.
      ids: values of bos_token_id, eos_token_id and pad_token_id.
    """
    architecture = next(name for name, family in ARCHITECTURES.items() if family == config.family)
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        values = dataclasses.astuple(scaling)
        rope = {"rope_type": "llama3", **dict(zip(ROPE_KEYS, values, strict=True))}
    return {
        "architectures": [architecture], "model_type": config.family,
        **{key: getattr(config, field) for field, key in NEEDED.items()},
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "hidden_act": "silu", "rms_norm_eps": config.rms_eps, "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        # attention_bias=True would add biases not only to q, k and v, but also to `o`. The
        # model_type qwen2 already gives biases to q, k and v.
        "attention_bias": False, "use_sliding_window": False,
        "torch_dtype": dtype, "dtype": dtype, **ids,
    }  # fmt: skip


def to_generation_json(source: pathlib.Path, ids: Mapping[str, Any]) -> dict:
    """Returns the content of generation_config.json: the original settings with all stop ids.

    Args:
      source: the resolved path of the original model.
      ids: values of bos_token_id, eos_token_id and pad_token_id.
    """
    file = source / "generation_config.json"
    own = tensor_files.read_json(file) if source.is_dir() and file.is_file() else {}
    stops = sorted({*read_stop_ids(source), ids["eos_token_id"]} - {None})
    return {**ids, **own, "eos_token_id": stops}
