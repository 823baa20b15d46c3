"""Selects the tokens that carry loss, according to the settings tokens.*.

The choices are all tokens, the tokens from the first error on, the tokens of the wrong step, and
spans that a user's function returns.
"""

import dataclasses
import importlib
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from copsd_jax.rewards import reward_functions
from copsd_jax.teaching import solution_steps, token_spans
from copsd_jax.teaching.replies import Attempt, Reply
from copsd_jax.teaching.solution_steps import Step
from copsd_jax.teaching.token_spans import Decoded

# Each status says how the tokens were selected. If the quote is missing or not found,
# tokens.on_failure decides which tokens are selected.
STATUSES = (
    *token_spans.STATUSES,  # the quote selects the tokens, or on_failure does if no quote is found
    "closest_step",  # on_failure=step uses the step that shares the most words with the quote
    "step",  # a critique gives the number of the first wrong step
    "right",  # all tokens, because the completion is right
    "all",  # tokens.select=all
    "spans",  # the user's function selects the tokens
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings `tokens.*` of `config/settings.py`."""

    select: str
    on_failure: str
    occurrence: str
    fuzzy: float


def import_span_function(select: str) -> Callable | None:
    """Imports the span function that tokens.select names; returns None if no function is named.

    The span function maps (problem, answer, reply) to spans [(start, end), ...] of characters in
    the answer. The argument `reply` of the span function is the text that the teacher is shown.

    Raises:
      ValueError: the function cannot be imported, or cannot be called with three arguments.
    """
    module, colon, name = select.partition(":")
    if not colon:
        return None
    try:
        found: Any = getattr(importlib.import_module(module), name)
        inspect.signature(found).bind("problem", "answer", "reply")
    except BaseException as error:
        if not reward_functions.is_reward_function_error(error):
            raise
        raise ValueError(
            f"tokens.select is {select!r}: it is not an importable function of (problem, answer, "
            f"reply); {type(error).__name__}: {error}"
        ) from error
    return found


def _check_span(select: str, span: Any, characters: int) -> tuple[int, int]:
    """Checks a span from the user's function, and returns the span as (start, end).

    Raises:
      ValueError: the value is not a span within an answer of `characters` characters.
    """
    pair: tuple[Any, ...] = tuple(span) if isinstance(span, Sequence) else ()
    whole = len(pair) == 2 and all(isinstance(at, numbers.Integral) for at in pair)
    if not whole or not 0 <= pair[0] <= pair[1] <= characters:
        raise ValueError(
            f"tokens.select is {select!r}: it returned {span!r}, not a pair (start, end) within an "
            f"answer of {characters} characters"
        )
    return int(pair[0]), int(pair[1])


def _call_span_function(
    select: str, spans_of: Callable, attempt: Attempt, answer: str, reply: Reply
) -> list:
    """Calls the user's function; adds the setting and the row's id to any error."""
    try:
        return list(spans_of(attempt.row.problem, answer, reply.trace or reply.text))
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(
            f"tokens.select is {select!r}: for row {attempt.row.id!r} it raised "
            f"{type(error).__name__}: {error}"
        ) from error


def select_tokens(
    settings: Settings, decoded: Decoded, start: int, length: int, attempt: Attempt, reply: Reply
) -> tuple[np.ndarray, str]:
    """Selects the tokens of a completion that carry loss.

    Args:
      settings: the settings tokens.*.
      decoded: the completion without its end token.
      start: the index of the character at which the answer begins; errors are located only in the
        answer.
      length: the number of tokens of the completion, including the end token. The end token carries
        loss if tokens.select is "all" or "from_error".
      attempt: the attempt.
      reply: the author's reply about the attempt.

    Returns:
      The mask of tokens that carry loss, bool [length], and one of `STATUSES`.
    """
    chosen = np.zeros(length, bool)
    spans_of = import_span_function(settings.select)
    if spans_of is not None:
        answer = decoded.text[start:]
        for span in _call_span_function(settings.select, spans_of, attempt, answer, reply):
            first, end = _check_span(settings.select, span, len(answer))
            chosen[slice(*token_spans.find_token_range(decoded, start + first, start + end))] = True
        return chosen, "spans"
    if settings.select == "all" or attempt.correct:
        return ~chosen, "all" if settings.select == "all" else "right"
    error, status = _find_error(settings, decoded.text[start:], reply)
    if error is None:
        return (~chosen if settings.on_failure == "full" else chosen), status
    first, end = token_spans.find_token_range(decoded, start + error[0], start + error[1])
    chosen[first : end if settings.select == "error_step" else length] = True
    return chosen, status


def _find_error(settings: Settings, text: str, reply: Reply) -> tuple[tuple[int, int] | None, str]:
    """Returns the span of the quoted error or wrong step (None if not found), and a status."""
    steps = solution_steps.split_steps(text)
    named = steps[reply.step - 1] if reply.step and reply.step <= len(steps) else None
    if not reply.quote.strip():
        if named:
            return (named.start, named.end), "step"
        return None, "failed" if reply.step else "no_quote"
    found = token_spans.find_quote(
        text, reply.quote, occurrence=settings.occurrence, threshold=settings.fuzzy
    )
    if found.status == "failed":
        step = _find_closest_step(reply.quote, steps) if settings.on_failure == "step" else None
        return ((step.start, step.end), "closest_step") if step else (None, found.status)
    if settings.select == "error_step":
        for step in steps:
            if step.start <= found.start < step.end:
                return (step.start, step.end), found.status
    return (found.start, found.end), found.status


def _find_closest_step(quote: str, steps: Sequence[Step]) -> Step | None:
    """Returns the step that shares the most words with a quote; None if no step shares a word."""
    words = set(quote.split())
    shared = [len(words & set(step.text.split())) for step in steps]
    return steps[int(np.argmax(shared))] if any(shared) else None
