"""Cuts a batch into micro-batches, and joins the results."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from copsd_jax.training import layout


def make_cuts(batch: layout.Batch, n: int) -> tuple[Callable, Callable]:
    """Returns two functions: `cut` splits [B, C] into micro-batches, and `join` undoes the split.

    `join` takes the flat arrays of all micro-batches, stacked into one array.
    """
    B, C = batch.mask_BC.shape
    source_UST = batch.source_UST
    if source_UST is None:
        return lambda x: _cut(x, n), lambda x: _join(x.reshape(n, B // n, C))

    # In `source_UST`, positions without a token have the index B * C. For a position without a
    # token, `cut` reads 0, and `join` drops the value.
    def cut(x_BC: jax.Array) -> jax.Array:
        none = jnp.zeros((1,), x_BC.dtype)
        return jnp.concatenate([x_BC.reshape(-1), none])[source_UST]

    def join(x: jax.Array) -> jax.Array:
        flat = jnp.zeros((B * C,), x.dtype)
        return flat.at[source_UST.reshape(-1)].set(x.reshape(-1), mode="drop").reshape(B, C)

    return cut, join


def _cut(x: jax.Array, n: int) -> jax.Array:
    """Reshapes [B, ...] to [n, B / n, ...]; row b becomes row b // n of micro-batch b % n.

    The cut is strided, so that each device already holds its rows of every micro-batch.
    """
    return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """Joins micro-batches [n, B / n, ...] to [B, ...]; inverts `_cut`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def split_batch(batch: layout.Batch, n: int) -> layout.Batch:
    """Splits all arrays of a batch into micro-batches.

    A packed batch already consists of micro-batches. Any other batch is cut into n micro-batches.
    The gather indices, which point into the flattened rows of the whole batch, are converted to
    indices into the rows of one micro-batch.

    Example: B = 4, n = 2, L = 10. Sample 3 is row 1 of micro-batch 1, so its gather index 34
    becomes 14.
    """
    cut, _ = make_cuts(batch, n)
    rest = jax.tree.map(cut, batch._replace(student=None, teacher=None, source_UST=None))
    if batch.source_UST is not None:
        return rest._replace(student=batch.student, teacher=batch.teacher)

    def side(s: layout.Side) -> layout.Side:
        B, L = s.tokens_BL.shape
        b = jnp.arange(B, dtype=jnp.int32)
        # Row b becomes row b // n of its micro-batch, so the gather indices of row b decrease by
        # (b - b // n) * L.
        local = s._replace(gather_BC=s.gather_BC - ((b - b // n) * L)[:, None])
        return jax.tree.map(lambda x: _cut(x, n), local)

    teacher = None if batch.teacher is None else side(batch.teacher)
    return rest._replace(student=side(batch.student), teacher=teacher)
