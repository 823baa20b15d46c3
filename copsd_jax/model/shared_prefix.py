"""Keys and values of the tokens that all prompts begin with."""

from typing import Any

import jax
import jax.numpy as jnp

from copsd_jax.model import transformer


def encode(decoder: transformer.Decoder, params: Any, tokens_1P, adapter, adapter_scale: float):
    """Keys and values [layers, 1, P, K, H] of the tokens all prompts begin with; differentiable."""
    positions = jnp.arange(tokens_1P.shape[1], dtype=jnp.int32)[None]
    ones = jnp.ones_like(tokens_1P)
    stream = transformer.Stream(tokens_1P, positions, ones, adapter, adapter_scale)
    return decoder.apply({"params": params}, (stream,), return_kv=True)[0].kv


_encode = jax.jit(encode, static_argnames=("decoder", "adapter_scale"))


def encode_ids(
    decoder: transformer.Decoder, params: Any, prefix_ids, adapter=None, adapter_scale: float = 1.0
) -> transformer.KV | None:
    """Keys and values [layers, 1, P, K, H] of the tokens all prompts begin with; None for none.

    They hold for one set of weights and one adapter only.
    """
    if len(prefix_ids) == 0:
        return None
    tokens_1P = jnp.asarray([list(prefix_ids)], jnp.int32)
    return _encode(decoder, params, tokens_1P, adapter, adapter_scale)
