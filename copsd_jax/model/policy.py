"""A policy: the weights that a decoder runs with."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """The weights that a decoder runs with; a pytree.

    Attributes:
      params: the base parameters, a tree in the form that `transformer.init_params` returns.
      adapter: a tree in the form that `lora.init_adapter` returns, or None if only the base
        parameters are used.
      scale: factor by which the adapter's output is multiplied, alpha / rank. The scale is static:
        each value needs its own compiled program, even if there is no adapter.
    """

    params: Any
    adapter: Any = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
