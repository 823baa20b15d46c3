"""Rules that define which keys a token of a row sees, for all implementations of row attention.

A token sees all keys of a shared prefix. In its own row, a token sees the keys of its own segment
and of its parent segment (`parents`), up to and including its own index.

    index     0 1 2 3 4 5 6        token 5 (segment 3, parent 1) sees keys 0, 1, 2 and 5
    segment   1 1 1 2 2 3 3
    parent    . . . 1 1 1 1
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Name by which remat policies select the attention results that the backward pass needs.
CHECKPOINT_NAME = "attention"
MASKED_LOGIT = -1e30  # finite, so that the results are finite even if a query sees no key


class Visibility(NamedTuple):
    """The segments that decide which keys of a row each token sees.

    `parents_BL` is None if no token has a parent segment.
    """

    segments_BL: jax.Array  # int32
    parents_BL: jax.Array | None = None  # int32, -1 for a token without a parent


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
      rows: segments and parents of the tokens in each row.
      prefix: keys and values that every token sees, or None.
    """

    q_BLKMH: jax.Array
    k_BLKH: jax.Array
    v_BLKH: jax.Array
    rows: Visibility
    prefix: Prefix | None = None


def pad_rows(x: jax.Array, multiple: int) -> jax.Array:
    """Pads the second axis of `x` [B, L, ...] with zeros to the next multiple of `multiple`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)) + ((0, 0),) * (x.ndim - 2))


def mark_visible_keys(query: Visibility, index_Q: jax.Array, segments_BS: jax.Array) -> jax.Array:
    """Returns bool [B, Q, S]: whether a query sees a key of its row.

    A query sees a key if the key is in the query's segment or in the parent of that segment, and if
    the key is not later than the query.

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
