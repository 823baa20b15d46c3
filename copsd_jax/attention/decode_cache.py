"""The cache and the partial softmax of decode attention, and functions that the kernels share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LENGTH_MULTIPLE = 128  # every implementation needs a cache length A that is a multiple of 128


class Cache(NamedTuple):
    """The keys (after RoPE) and values of all layers, with scales if the cache is int8."""

    k: jax.Array  # [layers, J, K, A, H], float32, bfloat16 or int8
    v: jax.Array
    k_scale: jax.Array | None = None  # float32 [layers, J, K, A]; None unless k is int8
    v_scale: jax.Array | None = None


class PartialSoftmax(NamedTuple):
    """The contribution of some of the keys to a softmax over a larger set of keys.

    Attributes:
      out_JKMH: sum of exp(logit - top) · value over these keys, float32.
      top_JKM: largest logit, float32; visibility.MASKED_LOGIT if no key is seen.
      total_JKM: sum of exp(logit - top) over these keys, float32.
    """

    out_JKMH: jax.Array
    top_JKM: jax.Array
    total_JKM: jax.Array


def check_length(length: int) -> None:
    """Checks that the kernels support the length A of a cache.

    Raises:
      ValueError: the length is not a positive multiple of LENGTH_MULTIPLE.
    """
    if length % LENGTH_MULTIPLE or not length:
        raise ValueError(
            f"the cache length is {length}: it must be a multiple of {LENGTH_MULTIPLE}"
        )


def count_cost(q_shape: tuple[int, ...], dtype: jnp.dtype, entries: float) -> dict[str, int]:
    """Counts FLOPs and bytes of one call, as the fields of a `pallas.CostEstimate`.

    Args:
      q_shape: shape of the queries, [J, K, M, H].
      dtype: dtype of the cache; an int8 entry also has a float32 scale.
      entries: number of entries that are read per slot, averaged over all J slots.
    """
    slots, heads, queries, size = q_shape
    dtype = jnp.dtype(dtype)
    total = slots * heads * entries
    read = total * 2 * (size * dtype.itemsize + 4 * (dtype == jnp.int8))
    return {
        "flops": round(4 * total * queries * size),
        "transcendentals": round(total * queries),
        "bytes_accessed": round(read + slots * heads * queries * (8 * size + 8)),
    }


def multiply(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Multiplies `a` [..., R, X] by `b` and sums over X in float32; returns [..., R, S].

    The leading axes of `a` are batch axes, which `b` has too. In `b`, X is axis number `axis`, and
    S is the remaining axis.
    """
    batch = tuple(range(a.ndim - 2))
    # By default, matrix units of TPUs and tensor cores of GPUs would round float32 to fewer bits.
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((a.ndim - 1,), (axis,)), (batch, batch)),
        precision=exact, preferred_element_type=jnp.float32,
    )  # fmt: skip
