"""Keys and values of a shared prefix, which consists of the tokens that all prompts begin with."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer


def encode_prefix(
    decoder: transformer.Decoder, policy: policy_lib.Policy, tokens_1P: jax.Array
) -> transformer.KV:
    """Computes a prefix's keys and values, [layers, 1, P, K, H], inside a traced function.

    Gradients flow through the result to the policy's arrays.

    Args:
      decoder: the model.
      policy: parameters and adapter.
      tokens_1P: int32 tokens of the prefix.
    """
    positions = jnp.arange(tokens_1P.shape[1], dtype=jnp.int32)[None]
    ones = jnp.ones_like(tokens_1P)
    stream = transformer.Stream(tokens_1P, positions, ones, policy.adapter, policy.scale)
    return decoder.apply({"params": policy.params}, (stream,), return_kv=True)[0].kv


_encode = jax.jit(encode_prefix, static_argnames="decoder")


def encode_prefix_ids(
    decoder: transformer.Decoder, policy: policy_lib.Policy, prefix_ids: Sequence[int]
) -> transformer.KV | None:
    """Computes a prefix's keys and values, [layers, 1, P, K, H], in a jitted call.

    The keys and values are valid only for the given policy.

    Args:
      decoder: the model.
      policy: parameters and adapter.
      prefix_ids: the P token ids of the prefix; if the sequence is empty, the result is None.
    """
    if len(prefix_ids) == 0:
        return None
    tokens_1P = jnp.asarray([list(prefix_ids)], jnp.int32)
    return _encode(decoder, policy, tokens_1P)
