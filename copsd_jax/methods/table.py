"""The modules of the methods, by name; `config.methods` declares the names and their traits."""

import importlib
from types import ModuleType

from copsd_jax.config import methods

METHODS: dict[str, ModuleType] = {
    name: importlib.import_module(f"copsd_jax.methods.{name}") for name in methods.METHODS
}
