"""Reads the model's path, shape, tokenizer and dtype, which a run needs before the weights."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from copsd_jax.config import settings as config_lib
from copsd_jax.model import lora, transformer
from copsd_jax.runtime import sharding
from copsd_jax.teaching import text_encoding
from copsd_jax.weights import hf_config, hub, tokenizer


def read_headers(
    config: config_lib.Config,
) -> tuple[pathlib.Path, transformer.ModelConfig, text_encoding.Tokenizer]:
    """Reads a model's config and tokenizer, without downloading weights.

    Args:
      config: the run's settings; section `model` is read.

    Returns:
      The path of the model, its shape, and its tokenizer.

    Raises:
      ValueError, OSError: a file is missing, or the model's config names an unknown architecture.
    """
    # If the run has recorded a commit, this commit is used instead of a branch or a tag.
    revision = config.model.commit or config.model.revision
    path = hub.resolve_model_path(config.model.path, revision, weights=False)
    own = config.model.tokenizer
    tok = tokenizer.load(
        hub.resolve_model_path(own, weights=False, setting="model.tokenizer") if own else path
    )
    if config.model.init == "random" and config.model.shape:
        shape = transformer.SHAPES[config.model.shape]
        if config.model.shape == "tiny":
            # The vocabulary size is rounded up so that the devices of a mesh can share it equally.
            shape = dataclasses.replace(shape, vocab_size=-(-len(tok) // 64) * 64)
        return path, shape, tok
    return path, hf_config.load_config(path), tok


def choose_dtype(name: str, devices: Mesh) -> Any:
    """Returns the dtype of weights and computation, from `model.dtype` and the mesh's platform.

    Args:
      name: auto, float32 or bfloat16; auto is float32 on a CPU and bfloat16 elsewhere.
      devices: the mesh.
    """
    auto = jnp.float32 if sharding.platform(devices) == "cpu" else jnp.bfloat16
    return {"auto": auto, "float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def trained_shapes(config: config_lib.Config, shape: transformer.ModelConfig) -> Any:
    """Returns the shapes and dtypes of the trained parameters, without allocating them.

    Args:
      config: the settings of a run; train.trainable chooses the adapter or all parameters.
      shape: the shape of the model.
    """
    if config.train.trainable == "full":
        return transformer.abstract_params(shape, jnp.float32)
    c = config.lora
    return jax.eval_shape(lambda: lora.init_adapter(shape, c.rank, c.targets, jax.random.key(0)))
