"""The least number of bytes that decoding reads, the bandwidth, and single steps, for decode.py."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from copsd_jax.model import policy as policy_lib
from copsd_jax.model import transformer
from copsd_jax.runtime import sharding
from copsd_jax.sampler import engine, request, truncation


def needed_bytes(
    prompts: Sequence[int], limits: Sequence[int], slots: int, weights: int, entry: int
) -> float:
    """Returns the least number of bytes that decoding must read.

    The weights are read once per step with all slots, and the live cache entries once per token.
    For example, a text has a prompt of 3 tokens and a limit of 3. The first token is drawn from the
    prefill. The next two tokens attend to 3 + 1 and 3 + 2 entries. So the text needs 9 entries, and
    2 / slots of the weights.

    Args:
      prompts: number of tokens of each text's prompt.
      limits: number of tokens of each completion.
      slots: number of slots.
      weights: bytes of the weights that a step reads.
      entry: bytes of one token's keys and values in all layers.
    """
    steps = sum(limit - 1 for limit in limits) / slots
    entries = sum(
        (limit - 1) * prompt + limit * (limit - 1) // 2
        for prompt, limit in zip(prompts, limits, strict=True)
    )
    return steps * weights + entries * entry


def weight_bytes(config: transformer.ModelConfig, params: Any) -> int:
    """Returns the bytes of weights that a step reads; an untied embedding is only indexed."""
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    return total if config.tie_embeddings else total - params["embed"]["embedding"].nbytes


def entry_bytes(config: transformer.ModelConfig, dtype: Any) -> int:
    """Returns the bytes of one token's keys and values in all layers, including int8 scales."""
    head = config.head_dim * jnp.dtype(dtype).itemsize + (4 if jnp.dtype(dtype) == jnp.int8 else 0)
    return 2 * config.n_layers * config.n_kv_heads * head


def measured_bandwidth(size: int, dtype: Any, width: int = 4096) -> float:
    """Measures the GB/s at which the product with a vector reads `size` bytes; best of 7."""
    rows = max(1, size // (width * jnp.dtype(dtype).itemsize))
    matrix, vector = jnp.ones((rows, width), dtype), jnp.ones(width, dtype)
    product = jax.jit(jnp.dot)
    product(matrix, vector).block_until_ready()
    seconds = []
    for _ in range(7):
        begun = time.perf_counter()
        product(matrix, vector).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return matrix.nbytes / min(seconds) / 1e9


def step_line(
    decoder: transformer.Decoder, params: Any, *, slots: int, steps: int, context: int, cache: Any,
    bandwidth: float | None, stacked: bool,
) -> dict:  # fmt: skip
    """Measures decode steps with all slots live; returns the line for JSON.

    The contexts are spread from 1/2 to 3/2 of `context`. The result is the best of 5 `decode` calls
    of `steps` tokens.

    Args:
      decoder: the model.
      params: the weights.
      slots: number of slots.
      steps: tokens per `decode` call.
      context: mean number of cache entries per slot.
      cache: dtype of the cache.
      bandwidth: GB/s, or None if not known.
      stacked: always scans the layers, even if runs would use `engine.unstack_layers`.
    """
    config, cache = decoder.config, jnp.dtype(cache)
    index_J = np.linspace(context / 2, context * 3 / 2, slots).astype(np.int32)
    length = request.round_up_slot_length(int(index_J.max()) + 7 * steps)
    state = engine.init_slot_state(decoder, slots, length, cache)
    old = state.slots
    rows = old.request.rows._replace(  # a buffer each, because donated buffers must not be shared
        temperature_J=jnp.ones(slots, jnp.float32), top_p_J=jnp.ones(slots, jnp.float32)
    )
    state = state._replace(slots=old._replace(
        live_J=jnp.ones(slots, bool), index_J=jnp.asarray(index_J), drawn_J=old.drawn_J + 1,
        request=old.request._replace(limit=old.request.limit + 2**30, rows=rows),
    ))  # fmt: skip
    stop_XV = jnp.zeros((request.STOP_SETS, config.vocab_size), bool)
    policy = policy_lib.Policy(params)
    layers = None if stacked else engine.unstack_layers(policy, None, sharding.current_mesh())
    weights = engine.Constants(policy, None, None, stop_XV, layers)
    static = decoder, truncation.find_features([(1.0, 0, 1.0, 0.0)]), steps
    cancel_J, enough = jnp.zeros(slots, bool), jnp.int32(1)
    compiled = jax.jit(engine.decode, static_argnums=(0, 1, 2), donate_argnums=4)
    program = compiled.lower(*static, weights, state, cancel_J, enough).compile()
    times = []
    for _ in range(6):
        begun = time.perf_counter()
        state, chunk = program(weights, state, cancel_J, enough)
        assert int(chunk.steps) == steps
        times.append((time.perf_counter() - begun) / steps)
    best = 1 + int(np.argmin(times[1:]))
    entries = int(index_J.sum()) + slots * (best * steps + (steps + 1) / 2)
    floor = weight_bytes(config, params) + entries * entry_bytes(config, cache)
    return {
        "system": "step_stacked" if stacked else "step",
        "step_seconds": times[best], "tokens_per_second": slots / times[best],
        "mean_context": entries / slots, "cache_length": length, "cache": cache.name,
        "floor_bytes": floor, "achieved_gb_per_second": floor / times[best] / 1e9,
        "floor_fraction": bandwidth and floor / bandwidth / 1e9 / times[best],
    }  # fmt: skip
