"""The weights with which tokens enter the loss of a step (`loss.norm`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def token_weights(
    mask_BC: jax.Array, norm: str, micro_batch: int = 0, length: int = 0
) -> jax.Array:
    """Returns the weight of every token of an optimizer step, float32 [B, C].

    Micro-batch losses then simply add up. Call it once on the mask of the whole step and slice the
    result by micro-batches. The sum of Σ weight · value over them is

      micro_token_mean: the mean over micro-batches of the token mean inside each (the reference's
        norm; every micro-batch weighs the same, and an empty one counts as 0);
      global_token_mean: the token mean of the step, for any micro-batches (DAPO);
      seq_mean: the mean over completions of their token means. Completions without a token are not
        counted, so padding rows change nothing;
      seq_mean_all: the same over all B, where those without a token count as 0 (GRPO's
        1/B Σ_i 1/|o_i|, and SDPO with micro-batches of one). Padding rows must not be in the mask;
      constant: Σ / (B · length), the divisor of Dr. GRPO, over all B as well.

    Every count is clamped to at least 1: an empty mask gives zeros, not NaN. For lengths 1 and 3,
    seq_mean weighs the tokens 1/2 | 1/6, 1/6, 1/6 and global_token_mean weighs each 1/4.

    Args:
      mask_BC: 1 or True for completion tokens that count. The B completions are in the order in
        which they are cut into micro-batches of consecutive rows.
      norm: a name of `NORMS`.
      micro_batch: completions per micro-batch, all devices together; 0 for B.
      length: tokens, of `constant` alone: the longest completion that may be sampled.

    Raises:
      ValueError: unknown norm; micro_batch does not divide B; constant without a length.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}: the choices are {', '.join(NORMS)}")
    micro_batch = micro_batch or mask_BC.shape[0]
    if micro_batch < 1 or mask_BC.shape[0] % micro_batch:
        raise ValueError(
            f"micro_batch is {micro_batch}: it must divide the {mask_BC.shape[0]} completions"
        )
    if norm == "constant" and length < 1:
        raise ValueError(f"norm is 'constant' and length is {length}: it must be at least 1")
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


# Divisors of the mask: (mask_BC, completions per micro-batch, length) -> [B, 1] or a scalar.
NORMS: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
    "micro_token_mean": _micro_token_mean,
    "global_token_mean": _global_token_mean,
    "seq_mean": _seq_mean,
    "seq_mean_all": _seq_mean_all,
    "constant": _constant,
}
