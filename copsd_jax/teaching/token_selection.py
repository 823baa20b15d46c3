"""Which tokens of a completion carry loss: all, from the first error on, the wrong step, or spans
that a function of the user's names."""

import dataclasses
import importlib
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from copsd_jax.rewards import reward_functions
from copsd_jax.teaching import contexts, replies, solution_steps, token_spans

# How an error was found. Besides localise.STATUSES: a critic's step, a completion that is right
# (distilled whole), all tokens asked for, and spans of the user's function.
# A quote that is not found leaves the policy on_failure: "failed" and "no_quote" with full or skip,
# "closest_step" where step found one that shares words with the quote.
STATUSES = (*token_spans.STATUSES, "closest_step", "step", "right", "all", "spans")
FAILED = ("failed", "no_quote")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings `tokens.*` of `config/settings.py`."""

    select: str
    on_failure: str
    occurrence: str
    fuzzy: float


def function(select: str) -> Callable | None:
    """The user's f(problem, answer, reply) -> [(start, end), ...] of `module:function`, or None.

    Spans are characters of the answer. The reply is the text that the teacher is shown.

    Raises:
      ValueError: it cannot be imported, or cannot be called with three arguments.
    """
    module, colon, name = select.partition(":")
    if not colon:
        return None
    try:
        found: Any = getattr(importlib.import_module(module), name)
        inspect.signature(found).bind("problem", "answer", "reply")
    except reward_functions.OF_IMPORT as error:
        raise ValueError(
            f"tokens.select is {select!r}: it is no importable function of (problem, answer, "
            f"reply); {error}"
        ) from error
    return found


def _inside(select: str, span: Any, characters: int) -> tuple[int, int]:
    """A span of the user's function, which knows the answer that it is in.

    Raises:
      ValueError: it is no (start, end) of that answer.
    """
    pair: tuple[Any, ...] = tuple(span) if isinstance(span, Sequence) else ()
    whole = len(pair) == 2 and all(isinstance(at, numbers.Integral) for at in pair)
    if not whole or not 0 <= pair[0] <= pair[1] <= characters:
        raise ValueError(
            f"tokens.select is {select!r}: it returned {span!r}, which is no (start, end) of an "
            f"answer of {characters} characters"
        )
    return int(pair[0]), int(pair[1])


def _spans(select: str, spans_of: Callable, attempt, answer: str, reply) -> list:
    """What the user's function returns; what it raises names the setting and the row."""
    try:
        return list(spans_of(attempt.row.problem, answer, reply.trace or reply.text))
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(
            f"tokens.select is {select!r}: for row {attempt.row.id!r} it raised "
            f"{type(error).__name__}: {error}"
        ) from error


def mask(
    settings: Settings,
    decoded: token_spans.Decoded,
    start: int,
    length: int,
    attempt: contexts.Attempt,
    reply: replies.Reply,
) -> tuple[np.ndarray, str]:
    """The tokens with loss, bool [length], and a status of STATUSES.

    Args:
      decoded: the completion without its end token.
      start: where the answer begins in its text; errors are looked for from there on.
      length: tokens of the completion, the end token included; it belongs to every suffix.
    """
    everything = np.ones(length, bool)
    spans_of = function(settings.select)
    if spans_of is not None:
        answer = decoded.text[start:]
        chosen = np.zeros(length, bool)
        for span in _spans(settings.select, spans_of, attempt, answer, reply):
            first, end = _inside(settings.select, span, len(answer))
            chosen[slice(*token_spans.tokens(decoded, start + first, start + end))] = True
        return chosen, "spans"
    if settings.select == "all":
        return everything, "all"
    if attempt.correct:
        return everything, "right"
    error, status = _error(settings, decoded.text[start:], reply)
    if error is None:
        return (everything if settings.on_failure == "full" else ~everything), status
    first, end = token_spans.tokens(decoded, start + error[0], start + error[1])
    chosen = np.zeros(length, bool)
    chosen[first : end if settings.select == "error_step" else length] = True
    return chosen, status


def _error(
    settings: Settings, text: str, reply: replies.Reply
) -> tuple[tuple[int, int] | None, str]:
    """The characters of the error: quoted, or the critic's step; None where none was found."""
    known = solution_steps.split(text).steps
    named = known[reply.step - 1] if reply.step and reply.step <= len(known) else None
    if not reply.quote:
        if named:
            return (named.start, named.end), "step"
        return None, "failed" if reply.step else "no_quote"
    found = token_spans.find(
        text, reply.quote, occurrence=settings.occurrence, threshold=settings.fuzzy
    )
    if found.status in FAILED:
        step = _closest(text, reply.quote, known) if settings.on_failure == "step" else None
        return ((step.start, step.end), "closest_step") if step else (None, found.status)
    if settings.select == "error_step":
        for step in known:
            if step.start <= found.start < step.end:
                return (step.start, step.end), found.status
    return (found.start, found.end), found.status


def _closest(text: str, quote: str, known) -> solution_steps.Step | None:
    """The step that shares most words with a quote; None where no word is shared."""
    words = set(quote.split())
    shared = [len(words & set(text[s.start : s.end].split())) for s in known]
    return known[int(np.argmax(shared))] if any(shared) else None
