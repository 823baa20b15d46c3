"""The weight of each token in the loss of an optimizer step, as set by `loss.norm`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def compute_token_weights(
    mask_BC: jax.Array, norm: str, micro_batch: int = 0, length: int = 0
) -> jax.Array:
    """Returns the weight of every token of an optimizer step, float32 [B, C].

    Call this function once on the mask of the whole step, and slice the result into micro-batches.
    The loss of the step is then the sum of Σ weight · value over all micro-batches. Each norm gives
    a different loss of the step:

      micro_token_mean: the mean over the tokens of each micro-batch, averaged over micro-batches.
        Every micro-batch has the same weight, and an empty micro-batch counts as 0 (OPSD, COPSD).
      global_token_mean: the mean over all tokens of the step; micro-batches make no difference
        (DAPO).
      seq_mean: the mean over the tokens of each completion, averaged over completions. Empty
        completions are not counted, so padding rows change nothing.
      seq_mean_all: the mean over the tokens of each completion, averaged over all B completions.
        An empty completion counts as 0, so the mask must not have padding rows. GRPO writes the
        weights of seq_mean_all as 1/B Σ_i 1/|o_i|. SDPO's norm equals seq_mean_all if every
        micro-batch has one completion.
      constant: the sum over all tokens, divided by B · length (arXiv 2503.20783).

    Every count is clamped to at least 1, so an empty mask gives zeros, not NaN. For example, let
    one completion have 1 token, and another completion have 3 tokens. Then seq_mean gives the
    weight 1/2 to the single token, and the weight 1/6 to each of the 3 tokens. In this example,
    global_token_mean gives every token the weight 1/4.

    Args:
      mask_BC: 1 or True for the completion tokens that contribute to the loss. Each micro-batch
        must be a block of consecutive rows.
      norm: a key of `NORMS`.
      micro_batch: number of completions per micro-batch, on all devices together; 0 means all B
        completions.
      length: maximum number of tokens in a completion; only `constant` reads this argument.

    Raises:
      ValueError: the norm is unknown, micro_batch does not divide B, or norm is constant and length
        is below 1.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}: the choices are {', '.join(NORMS)}")
    micro_batch = micro_batch or mask_BC.shape[0]
    if micro_batch < 1 or mask_BC.shape[0] % micro_batch:
        raise ValueError(
            f"micro_batch is {micro_batch}: it must divide the {mask_BC.shape[0]} completions"
        )
    if norm == "constant" and length < 1:
        raise ValueError(f"norm is 'constant' and length is {length}: length must be at least 1")
    mask_BC = jnp.asarray(mask_BC).astype(jnp.float32)
    return mask_BC / NORMS[norm](mask_BC, micro_batch, length)


def _micro_token_mean(mask_BC: jax.Array, micro_batch: int, _: int) -> jax.Array:
    micros = mask_BC.shape[0] // micro_batch
    count_G = jnp.sum(mask_BC.reshape(micros, -1), axis=1)
    return jnp.repeat(micros * jnp.maximum(count_G, 1), micro_batch)[:, None]


def _global_token_mean(mask_BC: jax.Array, *_: int) -> jax.Array:
    return jnp.maximum(jnp.sum(mask_BC), 1)


def _seq_mean(mask_BC: jax.Array, *_: int) -> jax.Array:
    count_B1 = jnp.sum(mask_BC, axis=1, keepdims=True)
    completions = jnp.sum((count_B1 > 0).astype(jnp.float32))
    return jnp.maximum(count_B1, 1) * jnp.maximum(completions, 1)


def _seq_mean_all(mask_BC: jax.Array, *_: int) -> jax.Array:
    return jnp.maximum(jnp.sum(mask_BC, axis=1, keepdims=True), 1) * max(mask_BC.shape[0], 1)


def _constant(mask_BC: jax.Array, _: int, length: int) -> jax.Array:
    return jnp.full((), max(mask_BC.shape[0], 1) * length, jnp.float32)


# Each function takes (mask_BC, completions per micro-batch, length), and returns the divisor of the
# mask: [B, 1] or a scalar.
NORMS: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
    "micro_token_mean": _micro_token_mean,
    "global_token_mean": _global_token_mean,
    "seq_mean": _seq_mean,
    "seq_mean_all": _seq_mean_all,
    "constant": _constant,
}
