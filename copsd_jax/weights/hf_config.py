"""Import and export of Hugging Face configs and end-of-text ids.

The module gguf_files.py reads the configs of GGUF files; `load_config` checks these configs too.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
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
# Sizes that transformers assumes if a config.json of the family does not state them.
DEFAULTS = {
    "qwen3": {"head_dim": 128, "num_key_value_heads": 32},
    "qwen2": {"num_key_value_heads": 32},
    "llama": {},
}
# Exceptions that Python raises if a value in a config has a type or size that no model has.
WRONG_VALUE = (TypeError, AttributeError, KeyError, IndexError, ArithmeticError, RecursionError)
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
    theta = _to_float("rope_theta", rope.get("rope_theta", raw.get("rope_theta", 10_000.0)), file)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{file}: RoPE type {kind!r} is not supported (allowed: default, llama3)")
    if missing := [key for key in ROPE_KEYS if key not in rope]:
        raise ValueError(f"{file}: RoPE type llama3 also needs {', '.join(missing)}")
    factor, low, high, positions = (_to_float(key, rope[key], file) for key in ROPE_KEYS)
    if low >= high:
        raise ValueError(f"{file}: {ROPE_KEYS[1]} is {low}, which is not below {high}")
    return theta, transformer.RopeScaling(factor, low, high, int(positions))


def _to_float(key: str, value: Any, file: pathlib.Path) -> float:
    """Returns a number of RoPE's settings as a float; refuses all but finite positive numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{file}: {key} is {value!r}, but must be a positive number")
    return float(value)


def load_config(path: pathlib.Path) -> transformer.ModelConfig:
    """Loads the config of a model.

    Args:
      path: a GGUF file or a folder with config.json, as returned by `hub.resolve_model_path`.

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if the config cannot be read, or if its architecture or an option is unsupported.
    """
    file = path if path.suffix == ".gguf" else path / "config.json"
    try:
        load = gguf_files.load_config if file == path else _load_folder_config
        config = load(file)
    except WRONG_VALUE as error:
        raise ValueError(f"{file}: a value is of a wrong kind ({error})") from error
    _check_model_sizes(config, path)
    return config


def _check_model_sizes(config: transformer.ModelConfig, path: pathlib.Path) -> None:
    """Checks the numbers in a config; raises ValueError for impossible numbers.

    The config in a damaged file can contain impossible numbers. Without `_check_model_sizes`, an
    impossible number would cause an error elsewhere.
    """
    c = dataclasses.asdict(config)
    for key in ("vocab_size", "d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                "max_position"):  # fmt: skip
        if type(c[key]) is not int or not 0 < c[key] < 10**8:
            raise ValueError(f"{path}: the config has an impossible {key}: {c[key]!r}")
    for key in ("rope_theta", "rms_eps"):
        if not (isinstance(c[key], int | float) and 0 < c[key] < math.inf):
            raise ValueError(f"{path}: the config has an impossible {key}: {c[key]!r}")
    if not isinstance(config.tie_embeddings, bool):
        raise ValueError(
            f"{path}: the config has an impossible tie_embeddings: {config.tie_embeddings!r}"
        )
    if config.n_heads % config.n_kv_heads or config.head_dim % 2 or config.n_layers > 1000:
        raise ValueError(
            f"{path}: no model has {config.n_layers} layers with {config.n_heads} heads and "
            f"{config.n_kv_heads} key heads of size {config.head_dim}"
        )


def _load_folder_config(file: pathlib.Path) -> transformer.ModelConfig:
    raw = tensor_files.read_json(file)
    family = _find_family(raw, file)
    _check_hf_options(raw, file)
    theta, scaling = _read_hf_rope(raw, file)
    if missing := [key for key in NEEDED.values() if key not in raw]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    heads, usual = raw["num_attention_heads"], DEFAULTS[family]
    key_heads = raw.get("num_key_value_heads", usual.get("num_key_value_heads", heads))
    return transformer.ModelConfig(
        **{field: raw[key] for field, key in NEEDED.items()},
        family=family, rope_theta=theta, rope_scaling=scaling,
        n_kv_heads=heads if key_heads is None else key_heads,
        head_dim=raw.get("head_dim") or usual.get("head_dim") or raw["hidden_size"] // heads,
        rms_eps=raw.get("rms_norm_eps", 1e-6), tie_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
    )  # fmt: skip


def read_stop_ids(path: pathlib.Path, vocab_size: int | None = None) -> list[int]:
    """Reads the end-of-text ids from generation_config.json and config.json, or from a GGUF file.

    Missing config files are skipped, because a folder with only a tokenizer has no config files.

    Args:
      path: a folder or a GGUF file, as returned by `hub.resolve_model_path`.
      vocab_size: the number of embeddings of the model; None accepts every id.

    Returns:
      The ids in ascending order, without duplicates; the list may be empty.

    Raises:
      ValueError: if a value is no token id, or if the model does not have the id.
    """
    found: list[tuple[str, Any]] = []
    if path.suffix == ".gguf":
        fields = gguf_files.read_header(path).metadata
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        found += [(f"{path}: {key}", fields.get(key)) for key in keys]
    else:
        files = [path / name for name in hub.CONFIG_FILES if (path / name).is_file()]
        for file in files:
            value = tensor_files.read_json(file).get("eos_token_id")
            entries = value if isinstance(value, list) else [value]
            found += [(f"{file}: eos_token_id", entry) for entry in entries]
    for name, value in found:
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{name} contains {value!r}, which is not a token id: correct it")
        if value is not None and vocab_size is not None and value >= vocab_size:
            raise ValueError(
                f"{name} contains {value}, but the model has only the ids 0 to {vocab_size - 1}: "
                "remove or correct it"
            )
    return sorted({value for _, value in found if value is not None})


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


def to_generation_json(
    source: pathlib.Path, ids: Mapping[str, Any], stop_ids: Iterable[int] = ()
) -> dict:
    """Returns the content of generation_config.json: the original settings with all stop ids.

    Args:
      source: the resolved path of the original model.
      ids: values of bos_token_id, eos_token_id and pad_token_id.
      stop_ids: further ids that end a text.
    """
    file = source / "generation_config.json"
    own = tensor_files.read_json(file) if source.is_dir() and file.is_file() else {}
    stops = sorted({*read_stop_ids(source), *stop_ids, ids["eos_token_id"]} - {None})
    return {**ids, **own, "eos_token_id": stops}
