"""The start of a command: signals, closed pipes and warnings are handled alike by all commands.

The imports of a command take seconds. A command therefore calls `begin` before all its imports but
this one. This module does not import JAX.
"""

import os

from copsd_jax.runtime import signals, streams


def begin() -> None:
    """Prepares this process, until its end, for a command.

    A signal ends the process at once, with a sentence; `stopping` handles signals during training.
    Output to a pipe without a reader is dropped.
    """
    signals.end_at_once()
    streams.ignore_closed_pipes()
    # Without this variable, transformers warns at every start that torch is missing, although
    # nothing needs torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
