"""Settings of a run: defaults, comments, allowed values, and the rules between settings.

May import: nothing of the package, and neither jax nor transformers.
"""

from copsd_jax.config.settings import Config, completions_per_step, default, preset

__all__ = ["Config", "completions_per_step", "default", "preset"]
