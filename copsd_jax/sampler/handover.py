"""Hand-over of a policy's weights to the sampler, at the start of each rollout phase.

Training may split parameters along the mesh axis `fsdp`. With split parameters, a decode step would
gather all parameters for every token. Therefore, parameters are gathered on the devices once per
phase, and a frozen base is gathered only once per run. If sampler and trainer use the same layout,
the sampler reads the trainer's own arrays.

The adapter either stays separate from the base, as in training, or is merged into a copy of the
base. For a projection of shape [in, out], a separate adapter of rank R costs `R * (in + out)` more
multiplications per token. A separate adapter also adds two small matrix products, which are
noticeable in a short step. A merged copy needs as much memory as the base.
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
    """A callable that converts policies for the sampler, and keeps a copy of the frozen base.

    Args:
      devices: the mesh that trainer and sampler share.
      frozen: weights that never change. The frozen weights are copied only once; other weights are
        copied at each call.
      key_heads: K, the model's number of key heads; see `sharding.partition_spec`.
      merge: whether to merge the adapter into a copy of the base.
      int8: whether to quantise projections with `lora.quantise_projections`.
      gather: whether to gather parameters along `fsdp`; if False, parameters stay sharded as in
        training.
      call: function that calls a jitted function; in a dry run, `call` only compiles the jitted
        function.
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
        """Returns the policy for decoding; the adapter is None if it was merged into the base."""
        params, adapter, scale = policy.params, policy.adapter, policy.scale
        if adapter is not None and self._merge:
            merged = self._convert(scale, self._int8, params, adapter)
            return policy_lib.Policy(merged, scale=scale)
        if self._gather or self._int8:
            frozen = params is self._frozen
            if frozen and self._base is not None:
                params = self._base
            else:
                params = self._convert(scale, self._int8, params, None)
                self._base = params if frozen else self._base
        if adapter is not None and self._gather:
            adapter = self._convert(scale, False, adapter)
        return policy_lib.Policy(params, adapter, scale)

    def kept(self) -> Any:
        """Returns the copy of the frozen base that this object keeps; None if there is no copy."""
        return self._base

    def _convert(self, scale: float, int8: bool, *trees: Any) -> Any:
        """Converts and reshards one tree; if a base and an adapter are given, merges them first."""
        shapes = jax.eval_shape(
            functools.partial(_convert_for_sampler, scale=scale, int8=int8), *trees
        )
        places = sharding.shardings(shapes, self._mesh, self._key_heads, gathered=self._gather)
        leaves, tree = jax.tree.flatten(places)
        return self._call(_program(scale, int8, tuple(leaves), tree), *trees)


def _convert_for_sampler(params: Any, adapter: Any = None, *, scale: float, int8: bool) -> Any:
    if adapter is not None:
        params = lora.merge_adapter(params, adapter, scale)
    return lora.quantise_projections(params) if int8 else params


@functools.lru_cache
def _program(scale: float, int8: bool, leaves: tuple, tree: Any) -> Any:
    """Returns `_convert_for_sampler`, jitted for the given shardings; the result is cached."""
    convert = functools.partial(_convert_for_sampler, scale=scale, int8=int8)
    return jax.jit(convert, out_shardings=jax.tree.unflatten(tree, leaves))
