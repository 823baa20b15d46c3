"""LoRA adapters in PEFT's layout, which transformers, vLLM and SGLang load beside a base model.

A folder has adapter_config.json and adapter_model.safetensors. Our `a` [in, R] and `b` [R, out] of
a layer are the transposes of its `lora_A` [R, in] and `lora_B` [out, R]; the product is scaled by
lora_alpha / r there as here. Projections have the names of `hf.BLOCK`.

Source: PEFT's developer guide "PEFT checkpoint format" and its LoraConfig.
"""

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax.model import lora, transformer
from copsd_jax.weights import hf, tensor_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FLOAT32 = np.dtype(np.float32)
# What makes of an adapter something else than x a b scale; elsewhere any of the values, or absent.
PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_rslora": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
}


def _name(target: str, layer: int, part: str) -> str:
    """`part` is a or b."""
    return f"base_model.model.model.layers.{layer}.{hf.BLOCK[target]}.lora_{part.upper()}.weight"


def _module(target: str) -> str:
    """q -> q_proj."""
    return hf.BLOCK[target].rpartition(".")[2]


def _table(
    config: transformer.ModelConfig, targets: tuple[str, ...], rank: int
) -> dict[str, tuple[str, str, int, tuple[int, int]]]:
    """PEFT's name -> (target, part, layer, PEFT's shape) of every tensor of an adapter."""
    sizes, out = config.projections(), {}
    for target in targets:
        width, features = sizes[target]
        for layer in range(config.n_layers):
            out[_name(target, layer, "a")] = (target, "a", layer, (rank, width))
            out[_name(target, layer, "b")] = (target, "b", layer, (features, rank))
    return out


def write(
    directory: str | os.PathLike,
    adapter: Mapping[str, Mapping[str, Any]],
    config: transformer.ModelConfig,
    *,
    alpha: float,
    base: str,
) -> pathlib.Path:
    """Writes an adapter as PEFT does, in float32; returns the folder.

    It is built beside the target and renamed, so that a folder of this name is always whole.

    Args:
      directory: absent or empty.
      adapter: tree of `lora.init_adapter`.
      config: shape of the base model.
      alpha: lora.alpha; the rank follows from the tree.
      base: name or path of the base model, for who loads the adapter.

    Raises:
      FileExistsError: the directory exists and is not empty.
      ValueError: the adapter does not fit the config.
    """
    target = pathlib.Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty")
    if not adapter or set(adapter) - set(lora.TARGETS):
        raise ValueError(
            f"an adapter on {list(adapter)}: the choices are {', '.join(lora.TARGETS)}"
        )
    targets = tuple(name for name in lora.TARGETS if name in adapter)
    rank = adapter[targets[0]]["a"].shape[-1]
    host = functools.lru_cache(maxsize=2)(lambda name, part: np.asarray(adapter[name][part]))
    items = {}
    for name, (projection, part, layer, shape) in _table(config, targets, rank).items():
        values = host(projection, part)
        if values.shape != (config.n_layers, *shape[::-1]) or values.dtype != FLOAT32:
            raise ValueError(
                f"adapter {projection}.{part} is {values.dtype} {values.shape}: this config has "
                f"float32 {(config.n_layers, *shape[::-1])}"
            )
        items[name] = tensor_files.Tensor(shape, functools.partial(np.transpose, values[layer]))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tensor_files.write_file(partial / WEIGHTS, items.items(), FLOAT32)
    text = json.dumps(_config_json(targets, rank, alpha, base), indent=2)
    (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
    if target.exists():
        target.rmdir()  # empty, as checked
    return partial.rename(target)


def _config_json(targets: tuple[str, ...], rank: int, alpha: float, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # an int wherever PEFT wrote it
        "lora_dropout": 0.0,
        "target_modules": [_module(target) for target in targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def read(folder: str | os.PathLike, config: transformer.ModelConfig) -> tuple[dict, float]:
    """(adapter, alpha) of a folder of `write`, or of PEFT's own, for a base model of this shape.

    Strict both ways: every tensor known, every one there, every shape equal. The tree is that of
    `lora.init_adapter`; a file of 16-bit numbers becomes float32.

    Raises:
      FileNotFoundError, ValueError: one sentence with the file and the tensor or the option.
    """
    path = pathlib.Path(folder)
    file = path / CONFIG
    raw = tensor_files.read_json(file)
    for key, allowed in PLAIN.items():
        if key in raw and raw[key] not in allowed:
            raise ValueError(f"{file}: {key} = {raw[key]!r} is not supported, only {allowed[0]!r}")
    missing = [key for key in ("peft_type", "r", "lora_alpha", "target_modules") if key not in raw]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}")
    modules = {_module(target): target for target in lora.TARGETS}
    found = raw["target_modules"]
    unknown = sorted(set(found) - set(modules)) if isinstance(found, list) else [found]
    if unknown or not found:
        raise ValueError(f"{file}: target_modules has {unknown}: known are {', '.join(modules)}")
    targets = tuple(target for module, target in modules.items() if module in found)
    return _tensors(path / WEIGHTS, config, targets, raw["r"]), float(raw["lora_alpha"])


def _tensors(
    file: pathlib.Path, config: transformer.ModelConfig, targets: tuple[str, ...], rank: int
) -> dict:
    """The adapter tree that a file holds."""
    start, entries = tensor_files.header(file)
    table = _table(config, targets, rank)
    if missing := sorted(set(table) - set(entries)):
        raise ValueError(f"{file} lacks tensors ({len(missing)}), the first is {missing[0]}")
    if extra := sorted(set(entries) - set(table)):
        raise ValueError(
            f"{file} has tensors that an adapter of {', '.join(targets)} on this model has not "
            f"({len(extra)}), the first is {extra[0]}"
        )
    content = file.read_bytes()
    layers: dict[str, dict[str, list[np.ndarray]]] = {t: {"a": [], "b": []} for t in targets}
    for name, (target, part, _, shape) in table.items():
        entry = entries[name]
        if tuple(entry["shape"]) != shape:
            raise ValueError(
                f"{file}: tensor {name} has shape {tuple(entry['shape'])}, the config wants {shape}"
            )
        begin, end = (start + offset for offset in entry["data_offsets"])
        values = np.frombuffer(content[begin:end], tensor_files.DTYPES[entry["dtype"]])
        layers[target][part].append(values.reshape(shape).T.astype(FLOAT32))
    return jax.tree.map(
        lambda each: jnp.asarray(np.stack(each)), layers, is_leaf=lambda x: isinstance(x, list)
    )
