"""Matrix products that accumulate in float32, or in float64 for float64 operands."""

import jax
import jax.numpy as jnp


def sum_dtype(x: jax.Array) -> jnp.dtype:
    """Returns the dtype for sums over `x`: float64 if `x` is float64, otherwise float32."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Multiplies two matrices of the same dtype over the given axes.

    Returns:
      A matrix of shape [other axis of `a`, other axis of `b`], in `sum_dtype(a)`.
    """
    # Unless the precision is set, accelerators round float32 operands to fewer bits.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())),
        precision=precision, preferred_element_type=sum_dtype(a),
    )  # fmt: skip


def differ(a_TD: jax.Array, b_TD: jax.Array) -> jax.Array:
    """Returns bool [T]: whether rows of `a_TD` and `b_TD` differ by more than rounding can explain.

    A compiler may fuse the same computation in two ways. After 30 layers, the float32 hidden states
    of two equal inputs may therefore differ by up to 8e-6 of the largest element. In bfloat16, the
    hidden states of equal inputs are equal. Relative to the largest element of the row of `a_TD`,
    the limit is 128 times the rounding error of `sum_dtype`: 1.5e-5 for states in float32 or
    bfloat16. A row that contains NaN or infinity counts as a row that differs.
    """
    dtype = sum_dtype(a_TD)
    gap_TD = jnp.abs(a_TD.astype(dtype) - b_TD.astype(dtype))
    limit_T = jnp.max(jnp.abs(a_TD.astype(dtype)), axis=-1) * (128 * float(jnp.finfo(dtype).eps))
    return ~((jnp.max(gap_TD, axis=-1) <= limit_T) & jnp.isfinite(limit_T))


def scale(x_TD: jax.Array, factor: jax.Array) -> jax.Array:
    """Multiplies `x_TD` by one scalar, or by one factor per row; rounds only once.

    Args:
      x_TD: array of shape [T, D] or [T].
      factor: a scalar, or one factor per row, [T], in `sum_dtype(x_TD)`.

    Returns:
      An array with the shape and dtype of `x_TD`.
    """
    factor = jnp.expand_dims(factor, range(factor.ndim, x_TD.ndim)) if factor.ndim else factor
    return (x_TD.astype(sum_dtype(x_TD)) * factor).astype(x_TD.dtype)
