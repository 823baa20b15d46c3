"""A policy's weights as the sampler reads them, made at the start of a rollout phase.

Training may split parameters over `fsdp`; a decode step would gather all of them for every token.
So they are gathered once, on the devices, and what does not change (the frozen base under adapters)
once a run. Where both layouts are one, the very arrays of the trainer are used.

The adapter is applied beside the base, as the trainer does, or merged into a copy of it: with rank
R it costs R (in + out) more multiplications of in x out per token, and two small products where
there was one large, which is felt where a step is short; the copy costs the memory of the base.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from copsd_jax.model import lora
from copsd_jax.model import policy as policy_lib
from copsd_jax.runtime import sharding


class HandOver:
    """Hands weights over to the sampler; keeps the frozen base where it had to be moved.

    Args:
      devices: the mesh of trainer and sampler.
      frozen: weights that never change, of which what is made is kept; others are made anew.
      key_heads: K of the model, see mesh.partition.
      merge: the adapter becomes part of a copy of the base.
      int8: projections as `lora.quantise_projections` makes them.
      gather: parameters whole along `fsdp`; otherwise as training has them.
      call: calls a jitted function; another than the default may compile it only.
    """

    def __init__(
        self, devices: Mesh, frozen: Any, key_heads: int | None = None, *,
        merge: bool, int8: bool, gather: bool,
        call: Callable[..., Any] = lambda program, *args: program(*args),
    ):  # fmt: skip
        self._call = call
        self._frozen, self._base, self._key_heads = frozen, None, key_heads
        self._mesh, self._merge, self._int8 = devices, merge, int8
        self._gather = gather and devices.shape["fsdp"] > 1

    def __call__(self, policy: policy_lib.Policy) -> policy_lib.Policy:
        """Returns the policy to decode with; its adapter is None where it is merged."""
        params, adapter, scale = policy.params, policy.adapter, policy.scale
        if adapter is not None and self._merge:
            return policy_lib.Policy(self._made(params, adapter, scale), scale=scale)
        if self._gather or self._int8:
            if params is not self._frozen:
                params = self._made(params, None, scale)
            else:
                if self._base is None:
                    self._base = self._made(params, None, scale)
                params = self._base
        if adapter is not None and self._gather:
            places = sharding.shardings(adapter, self._mesh, self._key_heads, gathered=True)
            adapter = self._call(_mover(places), adapter)
        return policy_lib.Policy(params, adapter, scale)

    def kept(self) -> Any:
        """What is made once a run and stays: the frozen base as the sampler reads it, or None."""
        return self._base

    def _made(self, params: Any, adapter: Any, scale: float) -> Any:
        made = functools.partial(_made, scale=scale, int8=self._int8)
        places = sharding.shardings(
            jax.eval_shape(made, params, adapter), self._mesh, self._key_heads,
            gathered=self._gather,
        )  # fmt: skip
        return self._call(_program(scale, self._int8, places), params, adapter)


def _made(params: Any, adapter: Any, *, scale: float, int8: bool) -> Any:
    if adapter is not None:
        params = lora.merge_adapter(params, adapter, scale)
    return lora.quantise_projections(params) if int8 else params


def _mover(places: Any) -> Any:
    leaves, tree = jax.tree.flatten(places)
    return _moved(tuple(leaves), tree)


@functools.lru_cache
def _moved(leaves: tuple, tree: Any) -> Any:
    return jax.jit(lambda x: x, out_shardings=jax.tree.unflatten(tree, leaves))


def _program(scale: float, int8: bool, places: Any) -> Any:
    leaves, tree = jax.tree.flatten(places)
    return _compiled(scale, int8, tuple(leaves), tree)


@functools.lru_cache
def _compiled(scale: float, int8: bool, leaves: tuple, tree: Any) -> Any:
    """One jitted function for each target, so that a phase compiles nothing that one before had."""
    return jax.jit(
        functools.partial(_made, scale=scale, int8=int8),
        out_shardings=jax.tree.unflatten(tree, leaves),
    )
