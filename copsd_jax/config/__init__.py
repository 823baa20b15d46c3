"""Settings of a run: each declared once with default, comment, choices or range, and their rules.

May import: nothing of the package, and neither jax nor transformers.
"""

from copsd_jax.config.run_settings import LORA_TARGETS
from copsd_jax.config.settings import Config, completions_per_step, default, preset

__all__ = ["LORA_TARGETS", "Config", "completions_per_step", "default", "preset"]
