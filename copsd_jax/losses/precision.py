"""Matrix products that accumulate in float32, or in float64 for float64 operands."""

import jax
import jax.numpy as jnp


def sum_dtype(x: jax.Array) -> jnp.dtype:
    """Returns the dtype of sums over x: float64 if x is float64, otherwise float32."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Multiplies two matrices of the same dtype over the given axes.

    Returns:
      A matrix of shape [other axis of a, other axis of b], in `sum_dtype(a)`.
    """
    # Unless the precision is set, accelerators round float32 operands to fewer bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())),
        precision=precision, preferred_element_type=sum_dtype(a),
    )  # fmt: skip


def scale(x_TD: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies x by a scalar, or each row of x by that row's number; rounds only once.

    Args:
      x_TD: [T, D] or [T].
      factor: a scalar or [T], in `sum_dtype(x_TD)`.

    Returns:
      An array of the shape and dtype of x_TD.
    """
    factor = jnp.expand_dims(factor, range(factor.ndim, x_TD.ndim)) if factor.ndim else factor
    return (x_TD.astype(sum_dtype(x_TD)) * factor).astype(x_TD.dtype)
