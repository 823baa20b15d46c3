"""An independent reader of PEFT adapters, built on the safetensors package: the tests' oracle."""

import json
import pathlib

import numpy as np
import safetensors.numpy

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def name_of(target: str, layer: int, part: str) -> str:
    """Returns PEFT's name of a tensor; `part` is A or B."""
    return f"base_model.model.model.layers.{layer}.{PROJECTIONS[target]}.lora_{part}.weight"


def read(folder) -> tuple[dict, float]:
    """Reads (adapter tree as of `lora.init_adapter`, alpha); every tensor must have its place."""
    folder = pathlib.Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    values = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    modules = config["target_modules"]
    targets = [t for t, module in PROJECTIONS.items() if module.split(".")[1] in modules]
    assert len(targets) == len(modules)
    n_layers = len(values) // (2 * len(targets))
    adapter = {
        target: {
            part.lower(): np.stack(
                [values.pop(name_of(target, layer, part)).T for layer in range(n_layers)]
            )
            for part in "AB"
        }
        for target in targets
    }
    assert not values
    assert {leaf["a"].shape[-1] for leaf in adapter.values()} == {config["r"]}
    return adapter, float(config["lora_alpha"])
