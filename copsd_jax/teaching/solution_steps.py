"""Splits an answer into steps: the contents of step tags or, without such tags, sentences."""

import bisect
import re
from collections.abc import Sequence
from typing import NamedTuple

from copsd_jax.teaching import equations


class Step(NamedTuple):
    """A step of an answer: the characters [start, end), without tags or surrounding white space."""

    number: int  # counted from 1
    start: int
    end: int
    final: bool  # whether the step states the answer
    text: str


_Span = tuple[int, int, bool]  # start, end, final

_TAG = re.compile(r"<(/?)(?:step_([1-9]\d{0,3})|answer)>")
_ANSWER = re.compile(r"\s*<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_FINAL = re.compile(r"\bthe\s+(?:final\s+)?answer\s+is\b|\\boxed(?![A-Za-z])", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"""\n
    | (?<!^\d) (?<!^\d\d) [.!?]+ [)\]}"'”’»*]* (?=\s|$)  # not the "1." of a list
    | [\u3002\uff01\uff1f\u0964\u1362\u06d4\u061f]+ [)\]}"'”’»*]*""",
    re.VERBOSE | re.MULTILINE,
)


def split_steps(text: str) -> tuple[Step, ...]:
    r"""Splits an answer into steps, numbered from 1.

    Step tags are written as `<step_1>...</step_1>`. If the step tags 1 to n occur in order, with
    nothing between them, the content of each step tag is a step. The last step tag need not be
    closed. The text after the last step tag, usually `<answer>...</answer>`, is one more step,
    which is final.

    In a text whose step tags are missing or out of order, each sentence is a step, and each tag
    ends a sentence. A sentence ends at a line break, at `.`, `!` or `?` before a blank ("3.5" is
    not split), or at a full stop of another script. If a sentence has several equations, or an
    equation and then the answer, each equation and the answer become separate steps. A step that
    contains "the answer is" or `\boxed` is final. The content of `<answer>` is also a final step.
    """
    tags = list(_TAG.finditer(text))
    spans = _split_at_tags(text, [tag for tag in tags if tag[2]])
    if spans is None:
        spans = _split_sentences(text, tags)
    steps: list[Step] = []
    for start, end, final in spans:
        part = text[start:end]
        start, end = start + len(part) - len(part.lstrip()), start + len(part.rstrip())
        if start < end:
            steps.append(Step(len(steps) + 1, start, end, final, text[start:end]))
    return tuple(steps)


def _split_at_tags(text: str, tags: Sequence[re.Match]) -> list[_Span] | None:
    """Returns the spans inside and after the step tags; None if the tags are not in order."""
    if not tags:
        return None
    spans, at = [], 0
    for n, opening in enumerate(tags[::2], 1):
        closing = tags[2 * n - 1] if 2 * n <= len(tags) else None
        if opening[0] != f"<step_{n}>" or text[at : opening.start()].strip():
            return None
        if closing is None:
            return [*spans, (opening.end(), len(text), False)]
        if closing[0] != f"</step_{n}>":
            return None
        spans.append((opening.end(), closing.start(), False))
        at = closing.end()
    answer = _ANSWER.match(text, at)
    return [*spans, (*(answer.span(1) if answer else (at, len(text))), True)]


def _split_sentences(text: str, tags: Sequence[re.Match]) -> list[_Span]:
    # Positions at which a sentence may be split: equations, and phrases that state the answer.
    marks = [(equation.start, False) for equation in equations.find_equations(text)]
    marks += [(match.start(), True) for match in _FINAL.finditer(text)]
    marks.sort()
    spans = []
    names = ["", *(tag[0] for tag in tags)]
    starts = [0, *(tag.end() for tag in tags)]
    ends = [*(tag.start() for tag in tags), len(text)]
    for name, at, end in zip(names, starts, ends, strict=True):
        if name == "<answer>":
            spans.append((at, end, True))
            continue
        stops = [match.end() for match in _SENTENCE_END.finditer(text, at, end)]
        for stop in [*stops, end]:
            inside = slice(*(bisect.bisect_left(marks, (place, False)) for place in (at, stop)))
            spans.extend(_split_solution_sentence(text, at, stop, marks[inside]))
            at = stop
    return spans


def _split_solution_sentence(
    text: str, start: int, end: int, marks: Sequence[tuple[int, bool]]
) -> list[_Span]:
    """Splits a sentence at all `marks` except the first; the part with the answer stays whole."""
    spans = []
    final = bool(marks) and marks[0][1]
    for at, is_answer in marks[1:]:
        if final:
            break
        # A bracket or quotation mark before a split position belongs to the next step.
        while text[at - 1] in "([{$\"'“‘«*":
            at -= 1
        spans.append((start, at, False))
        start, final = at, is_answer
    return [*spans, (start, end, final)]
