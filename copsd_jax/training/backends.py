"""Chooses the implementations of the divergence and of attention for the platform of a mesh.

The choice depends on the platform of the mesh's devices, which may differ from JAX's default
backend.
"""

from typing import Any

import numpy as np

from copsd_jax.attention import decode_attention as attention_lib
from copsd_jax.attention import row_attention
from copsd_jax.config import settings as config_lib
from copsd_jax.losses import divergence_loss
from copsd_jax.model import transformer


def build_divergence(c: config_lib.Config) -> divergence_loss.Divergence | None:
    """Builds the settings of the divergence, or returns None for a method without a teacher."""
    if not config_lib.traits(c).teacher:
        return None
    names = "divergence beta normalize_beta temperature top_k top_k_of tail clip_mode clip"
    return divergence_loss.Divergence(
        **config_lib.pick(c.loss, f"{names} rollout_clip"),
        # A greedy sampler (temperature 0) reports log-probabilities at temperature 1.
        sampling_temperature=c.rollout.temperature or 1.0,
    )


def choose_loss(c: config_lib.Config, platform: str) -> str:
    """Returns the loss implementation, a name in `divergence_loss.IMPLEMENTATIONS`.

    Args:
      c: the settings of the run.
      platform: platform of the mesh: cpu, gpu or tpu.

    Raises:
      ValueError: the chosen implementation cannot run on the platform; the message names the
        setting.
    """
    mixed = c.teacher.weights == "trust_region" and c.train.trainable == "full"
    try:
        return divergence_loss.resolve_implementation(
            c.loss.implementation, build_divergence(c), platform, one_width=not mixed
        )
    except ValueError as error:
        raise ValueError(f"loss.{error}") from error


def choose_decode_attention(c: config_lib.Config, platform: str) -> str:
    """Returns the implementation of decode attention, a key in `decode_attention.IMPLEMENTATIONS`.

    Args:
      c: the settings of the run.
      platform: platform of the mesh: cpu, gpu or tpu.

    Raises:
      ValueError: `sampler.attention` is pallas and the platform is cpu.
    """
    name = c.sampler.attention
    if name == "auto":
        return attention_lib.PLATFORM_IMPLEMENTATIONS[platform]
    if name == "pallas" and platform == "cpu":
        raise ValueError(
            "sampler.attention is 'pallas': its kernels run on gpu and tpu, but the mesh is cpu; "
            "choose auto or blocks"
        )
    return f"pallas_{platform}" if name == "pallas" else name


def choose_row_attention(
    c: config_lib.Config, platform: str, dtype: Any, shape: transformer.ModelConfig
) -> str:
    """Returns the implementation of row attention, a name in `row_attention.IMPLEMENTATIONS`.

    Training, scoring and prefill use row attention. This project has not run cudnn yet, so `auto`
    never chooses cudnn.

    Args:
      c: the settings of the run.
      platform: platform of the mesh: cpu, gpu or tpu.
      dtype: dtype in which the model computes.
      shape: the model's shape; cudnn supports only some head sizes.

    Raises:
      ValueError: the chosen implementation cannot run with these arguments.
    """
    name = c.model.attention
    if name == "auto":
        return "splash" if platform == "tpu" else "portable"
    home = {"portable": platform, "splash": "tpu", "cudnn": "gpu"}[name]
    reason = f"it runs on {home}, but the mesh is {platform}" if home != platform else ""
    if name == "cudnn" and not reason:
        if np.dtype(dtype).itemsize != 2:
            reason = f"it needs model.dtype=bfloat16, but the dtype is {np.dtype(dtype).name}"
        elif shape.head_dim % 8 or shape.head_dim > 128:
            reason = f"the head size must be 8, 16, ... 128, but it is {shape.head_dim}"
        else:
            reason = row_attention.explain_cudnn_refusal(shape.head_dim)
    if reason:
        raise ValueError(f"model.attention is {name!r}: {reason}; choose auto or portable")
    return name


def check_attention(
    c: config_lib.Config, platform: str, dtype: Any, shape: transformer.ModelConfig
) -> None:
    """Checks in advance that the chosen attention implementations can run.

    Args:
      c: the settings of the run.
      platform: platform of the mesh: cpu, gpu or tpu.
      dtype: dtype in which the model computes.
      shape: the model's shape.

    Raises:
      ValueError: an implementation cannot run; the message names its setting.
    """
    choose_decode_attention(c, platform)
    choose_row_attention(c, platform, dtype, shape)
