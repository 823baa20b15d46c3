"""Linear projections with optional low-rank adapters (LoRA, Hu et al. 2021).

An adapter is a tree of its own, `{'q': {'a': [layers, in, R], 'b': [layers, R, out]}, ...}` in
float32, never part of the base weights: a projection gets its slice as an argument, so the same
base weights serve the student (with it) and the initial policy (without it).

R is the rank.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


class LayerShapes(Protocol):
    """What `init_adapter` needs to know of a model."""

    @property
    def n_layers(self) -> int: ...

    def projections(self) -> dict[str, tuple[int, int]]: ...


@jax.custom_vjp
def _expand(low: jax.Array, b: jax.Array) -> jax.Array:
    """`low @ b`, [..., R] x [R, out].

    The gradient to `b` has its factors in the other order than automatic differentiation's: XLA on
    CPU transposes the left one in memory, which should be the narrow `low` and not the gradient of
    the output (a sixth of a training step). Reverse mode only.
    """
    return low @ b


def _expand_forward(low, b):
    return low @ b, (low, b)


def _expand_backward(saved, slope):
    low, b = saved
    slope_b = low.reshape(-1, low.shape[-1]).T @ slope.reshape(-1, slope.shape[-1])
    return slope @ b.T, slope_b


_expand.defvjp(_expand_forward, _expand_backward)


class Projection(nn.Module):
    """`y = x W + bias + (x a scale) b`, all products in `dtype`.

    Base and adapter leaves are cast to `dtype` for the products whatever they are stored in: in a
    bfloat16 model the float32 adapter is rounded on use, and its gradient is float32 again. A base
    kernel may be int8, with a leaf `scale`, float32 [features], beside it
    (see `quantise_projections`).
    """

    features: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, adapter: dict | None = None, scale: float = 1.0) -> jax.Array:
        """[..., in] in `dtype` -> [..., features]; `adapter` is {'a': [in, R], 'b': [R, out]}."""
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
            # Scaled where it is narrow.
            low = (x @ adapter["a"].astype(self.dtype)) * jnp.asarray(scale, self.dtype)
            y = y + _expand(low, adapter["b"].astype(self.dtype))
        return y


def init_adapter(config: LayerShapes, rank: int, targets: Sequence[str], key: jax.Array) -> dict:
    """A new adapter tree, float32: `a` uniform in ±1/sqrt(in) (PEFT's default), `b` zero.

    Raises:
      ValueError: for a target that no layer has, naming the choices.
    """
    sizes = config.projections()
    adapter = {}
    for target in targets:
        if target not in sizes:
            raise ValueError(f"lora.targets is {target!r}: the choices are {', '.join(sizes)}")
        width, out = sizes[target]
        bound = width**-0.5
        # The key follows from the target's name, so adding a target leaves the others as they were.
        target_key = jax.random.fold_in(key, TARGETS.index(target))
        shape = (config.n_layers, width, rank)
        adapter[target] = {
            "a": jax.random.uniform(target_key, shape, jnp.float32, -bound, bound),
            "b": jnp.zeros((config.n_layers, rank, out), jnp.float32),
        }
    return adapter


def merge_adapter(params: dict, adapter: dict, scale: float) -> dict:
    """Base weights with the adapter added in: `kernel + a b scale`, summed in float32.

    Returns a new tree that shares all other leaves with `params`; no leaf is changed.
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
    """The projections' kernels as int8, each column with a float32 `scale`; all else as it is.

    A column's largest magnitude becomes 127: the rounding is at most 1/254 of it. For decoding.
    """
    layers = dict(params["layers"])
    for target in TARGETS:
        kernel = layers[target]["kernel"].astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=1), jnp.float32(1e-30)) / 127
        whole = jnp.round(kernel / scale[:, None]).astype(jnp.int8)
        layers[target] = {**layers[target], "kernel": whole, "scale": scale}
    return {**params, "layers": layers}
