"""A policy: the weights with which a decoder is run."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """The weights with which a decoder is run; a pytree.

    Attributes:
      params: the base parameters, a tree as `transformer.init_params` returns it.
      adapter: a tree as `lora.init_adapter` returns it, or None for the base alone.
      scale: factor of the adapter's products, alpha / rank. It is static, so every value needs its
        own compiled program, even without an adapter.
    """

    params: Any
    adapter: Any = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
