"""The start of every command: the handling of signals, closed pipes and warnings.

The imports of a command take seconds. A command therefore imports this module and calls
`begin` before its slow imports. This module does not import JAX.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from copsd_jax.runtime import signals, streams


class CommandParser(argparse.ArgumentParser):
    """A parser of flags that accepts only whole names, and whose errors are one sentence."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Prints the message without the usage, and ends the program with exit code 2."""
        print(f"error: {message} ({self.prog} --help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def spell_program(argv: Sequence[str], module: str) -> str:
    """Returns the words with which the user has started a module of the package."""
    # `copsd_jax.command` passes these words as argv[0].
    return argv[0] if argv[0].startswith("copsd-jax ") else f"python -m copsd_jax.{module}"


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
