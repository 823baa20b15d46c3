"""Checksums of trees of arrays, which show whether a policy has changed."""

from typing import Any

import jax
import jax.numpy as jnp


def fingerprint_arrays(tree: Any) -> list[int]:
    """Returns two uint32 checksums over the bits of all numbers in a tree of arrays.

    The checksums are exact, so every mesh gives the same checksums. The second checksum also
    depends on the positions of the numbers.
    """
    return [int(x) for x in jax.device_get(_sum_arrays(tree))]


@jax.jit
def _sum_arrays(tree: Any) -> tuple[jax.Array, jax.Array]:
    """Returns a plain and a position-weighted sum of a tree's numbers, as uint32 scalars."""
    plain = placed = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        width = jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        place = jnp.ones(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):  # `place` stays odd, so `bits * place` loses no bits
            index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            place = place * jnp.uint32(2654435761) + index * jnp.uint32(2)
        plain = plain * jnp.uint32(31) + jnp.sum(bits, dtype=jnp.uint32)
        placed = placed * jnp.uint32(31) + jnp.sum(bits * place, dtype=jnp.uint32)
    return plain, placed
