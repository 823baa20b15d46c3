"""On-policy self-distillation of language models in JAX.

The names of the Python API (`api.py`) are imported on first use, so that `import copsd_jax` does
not start JAX.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copsd_jax.api import (
        Completion,
        Model,
        Scores,
        build_prompts,
        compare,
        divergence,
        load_model,
        sample,
        score,
        train_step,
    )

__all__ = [
    "Completion", "Model", "Scores", "build_prompts", "compare", "divergence", "load_model",
    "sample", "score", "train_step",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Returns the API object with the given name; the first use imports the API."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Without this variable, transformers warns that torch is missing, although nothing needs torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return getattr(importlib.import_module("copsd_jax.api"), name)


def __dir__() -> list[str]:
    """Returns the sorted names of the module's attributes and of the API."""
    return sorted({*globals(), *__all__})
