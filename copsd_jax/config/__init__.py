"""Settings of a run: each declared once with default, comment, choices or range, and their rules.

May import: nothing of the package, and neither jax nor transformers.
"""

from copsd_jax.config.settings import Config, completions_per_step, default, preset

__all__ = ["Config", "completions_per_step", "default", "preset"]
