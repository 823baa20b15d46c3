r"""Extraction of the final answer from a completion."""

import functools
import re

from copsd_jax.rewards import units

PATTERNS = ("boxed", "answer_is")
PLACES = ("last_after_think", "last_anywhere")

_ANSWER_IS = re.compile(
    r"\bthe\s+(?:final\s+)?answer\s+is\b[^\S\n]*:?[*_]*:?(?:[^\S\n]*\n)*[^\S\n]*", re.IGNORECASE
)
# A sentence ends at a full stop before white space, so 3.5 is not split.
_SENTENCE_END = re.compile("[.!?](?=\\s|$)|[\u3002\uff01\uff1f\u0964\u1362\u06d4\u061f]|\n")
# A full stop after one of these abbreviations does not end a sentence: "Dr. Lee", "Rs. 26".
_ABBREVIATION = re.compile(r"(?:\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|approx|Rs|Rp)|(?<!\S)(?:రూ))$")
# A reason that follows the answer is not part of the answer.
_REASON = re.compile(r",?\s+(?:since|because)\b|,\s+(?:as|so|which|where|given\s+that)\s")
_QUOTES = " \t\r*`\"'$"
_BETWEEN_BOXES = (
    r"(?:[\s$,;、，&.]|\\[()\[\],;:! ]|\\q?quad\b"
    r"|\\text\s*\{\s*(?:JOINS)?\s*\}|(?<!\w)(?:JOINS)(?!\w))*"
)


def extract_answer(text: str, pattern: str, where: str) -> str | None:
    r"""Extracts the answer from a text, exactly as written; returns None if there is no answer.

    Args:
      text: the completion.
      pattern: `boxed` extracts the content of the last `\boxed{...}` or `\boxed x` that is not
        empty. Boxes that are separated only by commas or "and" form one answer, which is a list.
        Braces must balance; `\{` and `\}` do not count as braces. If the last box is never closed,
        there is no answer, as in the reference code. `answer_is` extracts the text after the last
        "The answer is". The text goes to the end of the sentence or line, or to a reason
        ("since ...").
      where: `last_after_think` searches after the last `</think>`. If a `<think>` is open at the
        end of the text, there is no answer yet. A text without think tags is searched as a whole.
        If the prompt opened a think block, the caller must put `<think>` in front of the text.
        `last_anywhere` searches the whole text.

    Raises:
      ValueError: the value of `pattern` or `where` is unknown.
    """
    for name, value, choices in (("pattern", pattern, PATTERNS), ("where", where, PLACES)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}: the choices are {', '.join(choices)}")
    if where == "last_after_think":
        closed = text.rfind("</think>")
        if text.rfind("<think>") > closed:
            return None
        text = text if closed < 0 else text[closed + len("</think>") :]
    return (_extract_boxed(text) if pattern == "boxed" else _extract_sentence(text)) or None


def _extract_boxed(text: str) -> str | None:
    """Returns the content of the last box, or of the last boxes that form a list."""
    found: list[str] = []
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        read = _read_box(text, start)
        if read is None:
            return ", ".join(reversed(found)) or None
        content, after = read
        if not found:
            if content:
                found.append(content)
        elif after <= end and content and _compile_between().fullmatch(text, after, end):
            found.append(content)
        else:
            break
        end = start
    return ", ".join(reversed(found)) or None


@functools.cache
def _compile_between() -> re.Pattern[str]:
    joins = "|".join(map(re.escape, units.list_joins()))
    return re.compile(_BETWEEN_BOXES.replace("JOINS", joins), re.IGNORECASE)


def _read_box(text: str, start: int) -> tuple[str, int] | None:
    """Returns (content, end) of the box at `start`, or None if `start` has no complete box."""
    at = start + len("\\boxed")
    if text[at : at + 1].isalpha():  # \boxedfoo is another command
        return None
    while text[at : at + 1].isspace():
        at += 1
    if text[at : at + 1] == "{":
        return _read_braces(text, at)
    match = re.compile(r"[^\s$]+").match(text, at)
    return (match[0].rstrip(".,;:!?"), match.end()) if match else None


def _read_braces(text: str, start: int) -> tuple[str, int] | None:
    """Returns (text, end) for the braces at `start`, or None if the braces are never closed."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[start + 1 : match.start()].strip(), match.end()
    return None


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def _extract_sentence(text: str) -> str | None:
    """Returns the text after the last "The answer is"."""
    starts = [match.end() for match in _ANSWER_IS.finditer(text)]
    if not starts:
        return None
    start = starts[-1]
    sentence = text[start : _find_sentence_end(text, start)]
    if "\\boxed" in sentence:
        return _extract_boxed(sentence)
    reason = _REASON.search(sentence)
    if reason and reason.start():
        sentence = sentence[: reason.start()]
    return sentence.lstrip(_QUOTES).rstrip(_QUOTES + ".,;:?")


def _find_sentence_end(text: str, start: int) -> int:
    for end in _SENTENCE_END.finditer(text, start):
        before, after = text[max(start, end.start() - 8) : end.start()], text[end.end() :][:1]
        if end[0] == "." and _ABBREVIATION.search(before) and after and after != "\n":
            continue
        return end.start()
    return len(text)
