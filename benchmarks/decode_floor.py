"""What decoding has to read at least, the bandwidth, and decode steps alone, for decode.py."""

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
    """Bytes that decoding cannot do without: weights once a full step, live entries once a token.

    The token after a prompt of 3 is drawn from the prompt; the next two of a limit of 3 attend to
    3 + 1 and 3 + 2 entries: 9 entries, and 2 / slots of the weights.

    Args:
      prompts: tokens of each text's prompt.
      weights: bytes that a step reads.
      entry: bytes of a token's keys and values in all layers.
    """
    steps = sum(limit - 1 for limit in limits) / slots
    entries = sum(
        (limit - 1) * prompt + limit * (limit - 1) // 2
        for prompt, limit in zip(prompts, limits, strict=True)
    )
    return steps * weights + entries * entry


def weight_bytes(config: transformer.ModelConfig, params: Any) -> int:
    """Bytes of the weights that a step reads: an embedding that is not the head is only indexed."""
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    return total if config.tie_embeddings else total - params["embed"]["embedding"].nbytes


def entry_bytes(config: transformer.ModelConfig, dtype: Any) -> int:
    """Bytes of a token's keys and values in all layers, scales of an int8 cache included."""
    head = config.head_dim * jnp.dtype(dtype).itemsize + (4 if jnp.dtype(dtype) == jnp.int8 else 0)
    return 2 * config.n_layers * config.n_kv_heads * head


def measured_bandwidth(size: int, dtype: Any, width: int = 4096) -> float:
    """GB/s at which a matrix of `size` bytes is read by its product with a vector; best of 7."""
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
    """Decode steps alone, all slots live, contexts from a half to 3/2 of `context`.

    The best of 5 chunks of `steps` tokens; bandwidth in GB/s.

    Args:
      stacked: layers scanned also where runs read each by itself (`engine.unstack_layers`).
    """
    config, cache = decoder.config, jnp.dtype(cache)
    index_J = np.linspace(context / 2, context * 3 / 2, slots).astype(np.int32)
    length = request.round_up_length(int(index_J.max()) + 7 * steps)
    state = engine.init_state(decoder, slots, length, cache)
    old = state.slots
    rows = old.request.rows._replace(  # a buffer each: what is donated must not be shared
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
