"""Settings of a run: defaults, choices, ranges, and the rules between them.

May import: nothing of the package, and neither jax nor transformers.
"""

from copsd_jax.config.settings import LORA_TARGETS, Config, default, preset

__all__ = ["LORA_TARGETS", "Config", "default", "preset"]
