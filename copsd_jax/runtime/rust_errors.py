"""Errors of `tokenizers`, a library in Rust, as sentences that name the tokenizer."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def explain_rust_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns each error of a Rust library in the `with` block into a one-sentence ValueError.

    The Rust code of `tokenizers` panics if it meets a value that its authors thought impossible.
    A panic is a BaseException of a class that cannot be imported, so its name is compared. Rust has
    already printed its own message to stderr; Python cannot prevent this. Every other BaseException
    that is not an Exception passes, for example `signals.Stopped`.

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
