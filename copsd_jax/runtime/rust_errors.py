"""Errors of `tokenizers`, a library in Rust, as sentences that name the tokenizer."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def explain_rust_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns each error of a Rust library in the `with` block into a one-sentence ValueError.

    The Rust code of `tokenizers` panics if it meets a value that its authors thought impossible.
    Python sees a panic as a BaseException whose class cannot be imported, so this function compares
    the name of the class. Before a panic reaches Python, Rust prints a message to stderr, which
    Python cannot prevent. A BaseException that is neither a panic nor an Exception, such as
    `signals.Stopped`, is raised unchanged.

    Args:
      what: what failed, such as "the tokenizer in DIR cannot be read".
      remedy: what to do, such as "set model.tokenizer to another folder".

    Raises:
      ValueError: the block raised an Exception or panicked.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {reason[:500]}; {remedy}") from error
