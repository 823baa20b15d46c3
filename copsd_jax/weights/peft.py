"""LoRA adapters in PEFT's layout; transformers, vLLM and SGLang can load such adapters.

An adapter's folder contains the files adapter_config.json and adapter_model.safetensors. In each
layer, our matrix `a` [in, R] is the transpose of PEFT's `lora_A` [R, in]. Our matrix `b` [R, out]
is the transpose of PEFT's `lora_B` [out, R]. In PEFT as in this package, the product of an
adapter's two matrices is scaled by lora_alpha / r. `names.BLOCK` lists the Hugging Face names of
the projections.

Sources: PEFT's developer guide "PEFT checkpoint format" and PEFT's class LoraConfig.
"""

import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from copsd_jax.model import lora, transformer
from copsd_jax.weights import names, tensor_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FLOAT32 = np.dtype(np.float32)

# USED lists the fields of adapter_config.json that `open_adapter` reads. DESCRIPTIVE lists fields
# that do not change the numbers of a trained adapter.
USED = ("peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights")
DESCRIPTIVE = (
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version"),
    *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "layers_pattern"),
    # The tensors show which projections have an adapter.
    *("target_modules", "exclude_modules"),
)
# PLAIN lists fields that can change how an adapter is computed, each with its neutral values. For
# all other fields, the values in UNSET are neutral.
UNSET = (None, False, [], {})
PLAIN: dict[str, tuple] = {"bias": ("none",), "loftq_config": (None, {})}
# Initialisations that do not change the base weights.
PLAIN_INIT = (True, False, "gaussian", "orthogonal")
TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.([\w.]+)\.lora_([AB])\.weight")


class Adapter(NamedTuple):
    """A PEFT adapter whose tensors have not been read yet.

    Attributes:
      targets: the projections that have an adapter, in the order of `lora.TARGETS`.
      rank: the rank.
      alpha: the value of lora.alpha with which this package computes the same results as PEFT.
      read: function that returns the adapter as a tree of float32 NumPy arrays; the tree has the
        same structure as a tree from `lora.init_adapter`.
    """

    targets: tuple[str, ...]
    rank: int
    alpha: float
    read: Callable[[], dict[str, dict[str, np.ndarray]]]


def open_adapter(folder: pathlib.Path, config: transformer.ModelConfig) -> Adapter:
    """Opens an adapter in PEFT's layout; reads only the headers of its files.

    Only plain LoRA is accepted: all layers adapt the same projections with the same rank.

    Args:
      folder: the folder with the files CONFIG and WEIGHTS.
      config: config of the base model.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the adapter is not plain LoRA, or does not fit the config; the message names
        the field or the tensor.
    """
    rank, alpha = _read_plain_config(folder / CONFIG)
    tensors = tensor_files.open_file(folder / WEIGHTS)
    modules = {module: target for target in lora.TARGETS for module in names.BLOCK[target][:1]}
    places: dict[tuple[str, str, int], tensor_files.Tensor] = {}
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        if match is None or match[2] not in modules:
            raise ValueError(f"{folder / WEIGHTS}: {name} is not a tensor of a plain adapter")
        target, part = modules[match[2]], match[3].lower()
        width, features = config.projections()[target]
        if tensor.shape != (wanted := (rank, width) if part == "a" else (features, rank)):
            raise ValueError(f"{folder / WEIGHTS}: {name} has shape {tensor.shape}, not {wanted}")
        places[target, part, int(match[1])] = tensor
    targets = tuple(t for t in lora.TARGETS if any(t == target for target, _, _ in places))
    keys = {(t, part, n) for t in targets for part in "ab" for n in range(config.n_layers)}
    if not places or keys != places.keys():
        raise ValueError(
            f"{folder / WEIGHTS} has tensors for only some of the model's {config.n_layers} layers "
            f"(projections: {', '.join(targets) or 'none'})"
        )

    def stack(target: str, part: str) -> np.ndarray:
        layers = [places[target, part, n].read().T for n in range(config.n_layers)]
        return np.stack(layers).astype(FLOAT32)

    return Adapter(
        targets, rank, alpha, lambda: {t: {part: stack(t, part) for part in "ab"} for t in targets}
    )


def _read_plain_config(file: pathlib.Path) -> tuple[int, float]:
    """Returns rank and alpha from adapter_config.json; refuses everything but plain LoRA."""
    raw = tensor_files.read_json(file)

    def refuse(name: str, rule: str) -> NoReturn:
        raise ValueError(f"{file}: {name} is {raw.get(name)!r}: {rule}")

    if raw.get("peft_type") != "LORA":
        refuse("peft_type", "only 'LORA' is supported")
    for name in raw.keys() - {*USED, *DESCRIPTIVE}:
        # The values are compared as JSON text, because 0 equals False in Python.
        if json.dumps(raw[name]) not in map(json.dumps, PLAIN.get(name, UNSET)):
            allowed = " or ".join(map(repr, PLAIN.get(name, UNSET[:2])))
            refuse(name, f"only plain LoRA is supported, which has {allowed} here")
    init = raw.get("init_lora_weights", True)
    if json.dumps(init) not in map(json.dumps, PLAIN_INIT):
        refuse(
            "init_lora_weights",
            "this initialisation changes the base weights, so the adapter does not fit the "
            "original model; use path_initial_model_for_weight_conversion to save a plain adapter, "
            "or merge the adapter and use the merged model",
        )
    for name in ("r", "lora_alpha"):
        number: Any = raw.get(name)
        kinds = (int,) if name == "r" else (int, float)
        if type(number) not in kinds or not 0 < number < 10**9:
            whole = ", without a fraction" * (name == "r")
            refuse(name, f"it must be a positive number below 10**9{whole}")
    # PEFT scales by alpha / r, or by alpha / sqrt(r) with use_rslora.
    alpha = raw["lora_alpha"] * (math.sqrt(raw["r"]) if raw.get("use_rslora") else 1)
    return raw["r"], float(alpha)


def write(
    directory: str | os.PathLike, adapter: Mapping[str, Mapping[str, jax.Array]],
    config: transformer.ModelConfig, *, alpha: float, base: str,
) -> pathlib.Path:  # fmt: skip
    """Writes a folder with an adapter in PEFT's layout, in float32; returns the folder's path.

    The folder gets the name `directory` only when its files are complete (see
    `tensor_files.create_weights_folder`). For the other arguments, see `write_files`.

    Raises:
      FileExistsError: if the directory exists and is not an empty folder.
      ValueError: if the adapter does not fit the config.
    """
    with tensor_files.create_weights_folder(pathlib.Path(directory)) as folder:
        write_files(folder, adapter, config, alpha=alpha, base=base)
    return pathlib.Path(directory)


def write_files(
    folder: pathlib.Path, adapter: Mapping[str, Mapping[str, jax.Array]],
    config: transformer.ModelConfig, *, alpha: float, base: str, revision: str = "",
    dtype: Any = FLOAT32,
) -> None:  # fmt: skip
    """Writes the files of an adapter in PEFT's layout to an existing folder.

    Args:
      folder: the folder.
      adapter: tree with the structure that `lora.init_adapter` returns.
      config: config of the base model.
      alpha: value of the setting lora.alpha; the rank is read from the shapes in `adapter`.
      base: name or path of the base model, for programs that load the adapter.
      revision: commit of the base model's repository; "" if it is not known.
      dtype: the dtype in the files.

    Raises:
      ValueError: if the adapter does not fit the config, or if `dtype` cannot hold a value.
    """
    if not adapter or set(adapter) - set(lora.TARGETS):
        choices = ", ".join(lora.TARGETS)
        raise ValueError(f"the adapter has projections {list(adapter)} (allowed: {choices})")
    targets = [target for target in lora.TARGETS if target in adapter]
    rank = adapter[targets[0]]["a"].shape[-1]
    tensors = {}
    for target in targets:
        tensors |= _transpose_layers(target, adapter[target], config, rank)
    about = {"base_model_name_or_path": base, "revision": revision or None}
    stored = {
        name: tensor_files.convert_dtype(name, tensor, np.dtype(dtype))
        for name, tensor in tensors.items()
    }
    tensor_files.write_file(folder / WEIGHTS, stored.items(), np.dtype(dtype))
    tensor_files.write_json(folder / CONFIG, _to_config_json(targets, rank, alpha) | about)


def _transpose_layers(
    target: str, matrices: Mapping[str, jax.Array], config: transformer.ModelConfig, rank: int
) -> dict[str, tensor_files.Tensor]:
    """Maps PEFT's names to one projection's tensors, ordered by layer, with `a` before `b`."""
    width, features = config.projections()[target]
    host = {name: np.asarray(matrices[name]) for name in ("a", "b")}
    for (name, values), shape in zip(host.items(), ((width, rank), (rank, features)), strict=True):
        expected = (config.n_layers, *shape)
        if values.shape != expected or values.dtype != FLOAT32:
            raise ValueError(
                f"adapter {target}.{name} is {values.dtype} {values.shape}, but this config "
                f"needs float32 {expected}"
            )
    module = f"base_model.model.model.layers.{{}}.{names.BLOCK[target][0]}.lora_{{}}.weight"
    return {
        module.format(layer, name.upper()): tensor_files.Tensor(
            values[layer].T.shape, functools.partial(np.asarray, values[layer].T)
        )
        for layer in range(config.n_layers)
        for name, values in host.items()
    }


def _to_config_json(targets: list[str], rank: int, alpha: float) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank,
        # PEFT writes an integer if alpha is a whole number.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0,
        # `self_attn.q_proj` becomes `q_proj`.
        "target_modules": [names.BLOCK[target][0].rpartition(".")[2] for target in targets],
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
