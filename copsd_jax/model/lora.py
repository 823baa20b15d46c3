"""Linear projections with optional low-rank adapters (LoRA).

An adapter is a float32 tree, `{'q': {'a': [layers, in, R], 'b': [layers, R, out]}, ...}`, separate
from the base weights. Each projection receives its slice of the adapter as an argument. The
student has an adapter and the initial policy has none, so both can share one copy of the base
weights.

R is the rank. Source: Hu et al. 2021 (arXiv 2106.09685).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class LayerShapes(Protocol):
    """The part of `transformer.ModelConfig` that `init_adapter` reads."""

    @property
    def n_layers(self) -> int:
        """Returns the number of layers."""
        ...

    def projections(self) -> dict[str, tuple[int, int]]:
        """Returns the (input, output) width of each projection of a layer."""
        ...


@jax.custom_vjp
def _expand_adapter(low: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies `low` [..., R] by `b` [R, out], with a gradient that is cheap on CPU.

    XLA on CPU transposes the left factor of a product in memory. Therefore the gradient of `b` is
    computed with the narrow `low` as the left factor. To compute the gradient of `b`, automatic
    differentiation would use the wide gradient of the output as the left factor. With `low` as the
    left factor, a training step takes a sixth less time. Only reverse-mode differentiation is
    supported.
    """
    return low @ b


def _expand_forward(low, b):
    return low @ b, (low, b)


def _expand_backward(saved, grad):
    low, b = saved
    grad_b = low.reshape(-1, low.shape[-1]).T @ grad.reshape(-1, grad.shape[-1])
    return grad @ b.T, grad_b


_expand_adapter.defvjp(_expand_forward, _expand_backward)


class Projection(nn.Module):
    """A linear layer, `y = x @ W + bias + (x @ a * scale) @ b`, with all products in `dtype`.

    Base and adapter leaves may be stored in any dtype, and are cast to `dtype` for the products. In
    a bfloat16 model, the float32 adapter is rounded to bfloat16 for the products, and the adapter's
    gradient is float32. An int8 base kernel needs a second leaf: `scale`, float32 [features] (see
    `quantise_projections`).

    Attributes:
      features: output width.
      use_bias: whether there is a bias.
      dtype: dtype of the products and of the output.
    """

    features: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, adapter: dict | None = None, scale: float = 1.0) -> jax.Array:
        """Projects x.

        Args:
          x: input, [..., in], in `dtype`.
          adapter: adapter of this layer, {'a': [in, R], 'b': [R, features]}, or None.
          scale: factor of the adapter.

        Returns:
          The output, [..., features], in `dtype`.
        """
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable("params", "scale"):
            factor = self.get_variable("params", "scale").reshape((1,) * (y.ndim - 1) + (-1,))
            y = (y.astype(jnp.float32) * factor).astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if adapter is not None:
            # The scale is multiplied into the narrow array, which has only R columns instead of
            # `features`.
            low = (x @ adapter["a"].astype(self.dtype)) * jnp.asarray(scale, self.dtype)
            y = y + _expand_adapter(low, adapter["b"].astype(self.dtype))
        return y


def init_adapter(config: LayerShapes, rank: int, targets: Sequence[str], key: jax.Array) -> dict:
    """Creates a float32 adapter: `a` is uniform in ±1/sqrt(in), as in PEFT, and `b` is zero.

    Args:
      config: object with the number of layers and the widths of the projections.
      rank: rank of the adapter, R.
      targets: names of projections in TARGETS.
      key: random key.

    Raises:
      ValueError: a target is not the name of a projection; the message lists the choices.
    """
    sizes = config.projections()
    adapter = {}
    for target in targets:
        if target not in sizes:
            raise ValueError(f"lora.targets is {target!r}: the choices are {', '.join(sizes)}")
        width, out = sizes[target]
        bound = width**-0.5
        # The key depends only on the target, so a target's values stay the same if other targets
        # are added.
        target_key = jax.random.fold_in(key, TARGETS.index(target))
        shape = (config.n_layers, width, rank)
        adapter[target] = {
            "a": jax.random.uniform(target_key, shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((config.n_layers, rank, out), jnp.float32),
        }
    return adapter


def merge_adapter(params: dict, adapter: dict, scale: float) -> dict:
    """Adds an adapter to the base weights: computes `kernel + (a @ b) * scale` in float32.

    Args:
      params: tree of base weights; this tree is not changed.
      adapter: tree in the form that `init_adapter` returns.
      scale: factor of the adapter.

    Returns:
      A new tree; all leaves other than the merged kernels are shared with `params`.
    """
    layers = dict(params["layers"])
    for target, leaf in adapter.items():
        kernel = layers[target]["kernel"]
        delta = jnp.einsum(
            "lir,lro->lio", leaf["a"], leaf["b"], precision=jax.lax.Precision.HIGHEST
        ) * jnp.float32(scale)
        merged = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
        layers[target] = {**layers[target], "kernel": merged}
    return {**params, "layers": layers}


def quantise_projections(params: dict) -> dict:
    """Quantises the kernels of all projections to int8, with a float32 `scale` for each column.

    The largest magnitude in a column becomes 127, so rounding errors are at most 1/254 of the
    largest magnitude. All leaves other than the kernels of projections are unchanged. Quantised
    parameters are meant for decoding.
    """
    layers = dict(params["layers"])
    for target in TARGETS:
        kernel = layers[target]["kernel"].astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=1), jnp.float32(1e-30)) / 127
        whole = jnp.round(kernel / scale[:, None]).astype(jnp.int8)
        layers[target] = {**layers[target], "kernel": whole, "scale": scale}
    return {**params, "layers": layers}
