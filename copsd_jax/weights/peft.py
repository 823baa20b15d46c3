"""LoRA adapters in PEFT's layout; transformers, vLLM and SGLang can load such adapters.

An adapter's folder contains the files adapter_config.json and adapter_model.safetensors. In each
layer, our matrix `a` [in, R] is the transpose of PEFT's `lora_A` [R, in]. Our matrix `b` [R, out]
is the transpose of PEFT's `lora_B` [out, R]. In PEFT as in this package, the product of an
adapter's two matrices is scaled by lora_alpha / r. `names.BLOCK` lists the Hugging Face names of
the projections.

Sources: PEFT's developer guide "PEFT checkpoint format" and PEFT's class LoraConfig.
"""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from copsd_jax.model import lora, transformer
from copsd_jax.weights import names, tensor_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FLOAT32 = np.dtype(np.float32)


def write(
    directory: str | os.PathLike, adapter: Mapping[str, Mapping[str, jax.Array]],
    config: transformer.ModelConfig, *, alpha: float, base: str,
) -> pathlib.Path:  # fmt: skip
    """Writes a folder with an adapter in PEFT's layout, in float32; returns the folder's path.

    The folder gets the name `directory` only when its files are complete (see
    `tensor_files.create_folder`).

    Args:
      directory: the folder to write; it must be absent or empty.
      adapter: tree with the structure that `lora.init_adapter` returns.
      config: config of the base model.
      alpha: value of the setting lora.alpha; the rank is read from the shapes in `adapter`.
      base: name or path of the base model, for programs that load the adapter.

    Raises:
      FileExistsError: if the directory exists and is not an empty folder.
      ValueError: if the adapter does not fit the config.
    """
    if not adapter or set(adapter) - set(lora.TARGETS):
        choices = ", ".join(lora.TARGETS)
        raise ValueError(f"the adapter has projections {list(adapter)} (allowed: {choices})")
    targets = [target for target in lora.TARGETS if target in adapter]
    rank = adapter[targets[0]]["a"].shape[-1]
    tensors = {}
    for target in targets:
        tensors |= _transpose_layers(target, adapter[target], config, rank)
    with tensor_files.create_folder(pathlib.Path(directory)) as folder:
        tensor_files.write_file(folder / WEIGHTS, tensors.items(), FLOAT32)
        tensor_files.write_json(folder / CONFIG, _to_config_json(targets, rank, alpha, base))
    return pathlib.Path(directory)


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


def _to_config_json(targets: list[str], rank: int, alpha: float, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        # PEFT writes an integer if alpha is a whole number.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0,
        # `self_attn.q_proj` becomes `q_proj`.
        "target_modules": [names.BLOCK[target][0].rpartition(".")[2] for target in targets],
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
