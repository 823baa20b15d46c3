"""The start of every command: the handling of signals, closed pipes and warnings.

The imports of a command take seconds. A command therefore imports this module and calls
`begin` before its slow imports. This module does not import JAX.
"""

import os

from copsd_jax.runtime import signals, streams


def begin() -> None:
    """Prepares this process for a command; the effects last until the process ends.

    A signal ends the process at once, with a one-sentence message. During training, the handlers of
    `stopping` replace this behaviour. Output to a pipe without a reader is dropped.
    """
    signals.end_at_once()
    streams.ignore_closed_pipes()
    # Without this variable, transformers warns at every start that torch is missing, although
    # nothing needs torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
