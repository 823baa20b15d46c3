"""Failures of a run that one sentence explains better than a traceback does."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

from copsd_jax.runtime import nonfinite, processes, storage, streams


class EngineError(Exception):
    """A failure of a server or of a reward function, described in one sentence."""


class UnusableFile(Exception):
    """An unusable file of the run, described in one sentence that says what to do."""


class RefusedRun(Exception):
    """A reason to refuse a run, found only after the weights were loaded, as one sentence."""


@contextlib.contextmanager
def exit_on_failure(directory: pathlib.Path) -> Iterator[None]:
    """Ends the program with a one-sentence message if a traceback would not help.

    A traceback does not help with these failures: a server that fails, a damaged file, a disk that
    fails or is full, and a lack of memory.

    Args:
      directory: the work directory. Messages about servers and files say that the same command
        continues the run.

    Raises:
      SystemExit: raised in place of EngineError, UnusableFile, StorageError, MemoryError, and
        errors of the disk. In a run of several processes, this process ends at once instead.
    """
    try:
        yield
    except (EngineError, UnusableFile, OSError) as error:
        disk = isinstance(error, storage.StorageError)
        if isinstance(error, OSError) and not disk and error.errno not in storage.DISK_ERRORS:
            raise
        said = f"error: {streams.spell_error(error)}; the same command continues {directory}"
        processes.exit_with_error(said, error)
    except MemoryError as error:
        processes.exit_with_error(f"error: {error}", error)


def report(error: Exception) -> int:
    """Prints the sentence of an error that ends a command; returns the command's exit code."""
    print(f"error: {streams.spell_error(error)}", file=sys.stderr)
    return 3 if isinstance(error, nonfinite.NonFinite) else 2
