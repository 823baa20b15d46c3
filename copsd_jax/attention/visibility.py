"""Visibility of keys within a row, for all implementations of row attention.

A token sees all keys of a shared prefix. In its own row, it sees keys of its own segment and of its
parent segment (`parents`), at or before its own index.

    index     0 1 2 3 4 5 6        token 5 (segment 3, parent 1) sees keys 0, 1, 2 and 5
    segment   1 1 1 2 2 3 3
    parent    . . . 1 1 1 1
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Checkpoint name of the attention results that the backward pass needs, for remat policies.
CHECKPOINT_NAME = "attention"
MASKED_LOGIT = -1e30  # finite, so that a query that sees no key gives finite numbers


class Visibility(NamedTuple):
    """Segments that decide which keys of its row each token sees."""

    segments_BL: jax.Array  # int32
    parents_BL: jax.Array | None = None  # int32, -1 for no parent; None if no token has one


class Prefix(NamedTuple):
    """Keys and values that every token sees; gradients flow through them."""

    k_PKH: jax.Array
    v_PKH: jax.Array


class RowInputs(NamedTuple):
    """Inputs of row attention.

    Attributes:
      q_BLKMH: queries, scaled and rotated.
      k_BLKH: keys, rotated.
      v_BLKH: values.
      rows: visibility of the keys.
      prefix: keys and values that every token sees, or None.
    """

    q_BLKMH: jax.Array
    k_BLKH: jax.Array
    v_BLKH: jax.Array
    rows: Visibility
    prefix: Prefix | None = None


def pad_rows(x: jax.Array, multiple: int) -> jax.Array:
    """Appends zeros along the second axis of [B, L, ...], up to a multiple of `multiple`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)) + ((0, 0),) * (x.ndim - 2))


def mark_visible_keys(query: Visibility, index_Q: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Returns bool [B, Q, S]: whether a query sees a key of its row.

    A query sees a key that is in the query's segment or in that segment's parent, and is not later
    than the query.

    Args:
      query: segments and parents of the queries, [B, Q].
      index_Q: int32 index of each query in its row.
      segments_BS: int32 segments of the first S keys of the row.
    """
    same = query.segments_BL[:, :, None] == segments_BS[:, None, :]
    if query.parents_BL is not None:
        same = same | (query.parents_BL[:, :, None] == segments_BS[:, None, :])
    index_S = jnp.arange(segments_BS.shape[1], dtype=jnp.int32)
    return same & (index_S[None, None, :] <= index_Q[None, :, None])
