"""Policies: the weights with which a model is run."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """Weights to run a decoder with; a pytree.

    Attributes:
      params: the base parameters, a tree of `transformer.init_params`.
      adapter: a tree of `lora.init_adapter`, or None for the base alone.
      scale: factor of the adapter's products, alpha / rank. It is static: every value is a
        compiled program of its own, also without an adapter.
    """

    params: Any
    adapter: Any = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
