"""Leaks: the parts of a text that state the final answer."""

import re
import unicodedata
from collections.abc import Iterator

from copsd_jax.rewards import comparison

_DIGITS = r"(?:\d+|[\u1369-\u137c]+)"  # digits of any script; `\d` does not match Ge'ez numerals


# Matches a number, with or without separators. A blank is a separator only before a group of three
# digits, as in 10 000.
_NUMBER = re.compile(
    rf"{_DIGITS}(?:(?:[.,'’٫٬،．，]|\{{,\}}){_DIGITS}|(?:\\,|[ \u00a0\u202f])\d{{3}}(?!\d))*"
)

_FRACTION = re.compile(r"\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|(?<!\d)\d+\s*[/／⁄]\s*\d+")

_MINUS = "-−‐‑–－﹣"


# Scripts that put no blanks between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)


def has_leak(text: str, answer: str) -> bool:
    """Tells whether a text states the final answer.

    Numbers may be written in the digits of any script, and are compared by value: "8 + 5 = 13."
    states 13, but "130" and "1.13" do not. An answer that is not a number must occur as whole
    words. Case is ignored, except in an answer of one letter: the answer "A" does not match the
    word "a". The function does not find numbers written as words, or formulas that equal the answer
    but are written differently. If the answer is unknown (""), the function returns False.
    """
    return bool(_find_leaks(text, answer))


def mask_leak(text: str, answer: str) -> str:
    """Returns the text with "[...]" in place of each final answer that `has_leak` finds."""
    out, at = [], 0
    for start, end in _find_leaks(text, answer):
        if start >= at:
            out += [text[at:start], "[...]"]
        at = max(at, end)
    return "".join(out) + text[at:]


def _find_leaks(text: str, answer: str) -> list[tuple[int, int]]:
    """Returns the spans [start, end) of the parts that state the answer, in order."""
    if not answer.strip():
        return []
    spans = [match.span() for match in _FRACTION.finditer(text)]
    spans += [
        (_find_leak_start(text, match.start()), match.end()) for match in _NUMBER.finditer(text)
    ]
    found = [s for s in spans if comparison.compare_plainly(answer, text[slice(*s)]) is True]
    if _NUMBER.fullmatch(answer.strip().lstrip(_MINUS + "+")) is None:
        found += find_words(text, answer)
    return sorted(found)


def _find_leak_start(text: str, start: int) -> int:
    """Returns the index at which a number starts; a minus sign is part of the number.

    A hyphen after a word, or a minus sign after an operand, is not part of the number.
    """
    before = text[max(start - 20, 0) : start].rstrip(" ")
    minus = before[-1:]
    if not minus or minus not in _MINUS or before[-2:-1].isalnum():
        return start
    operand = before[:-1].rstrip()[-1:]
    if operand.isdigit() or operand in tuple(")]}"):
        return start
    return start - len(text[max(start - 20, 0) : start]) + len(before) - 1


def find_words(text: str, wanted: str) -> Iterator[tuple[int, int]]:
    """Yields the spans [start, end) where `wanted` occurs as whole words.

    Differences in white space, case and Unicode composition are ignored. If `wanted` is a single
    character, however, the case must be the same.
    """
    wanted = " ".join(wanted.split())
    forms = {unicodedata.normalize(form, wanted) for form in ("NFC", "NFD")} | {wanted}
    pattern = "|".join(r"\s+".join(map(re.escape, form.split())) for form in sorted(forms))
    case = re.NOFLAG if len(wanted) == 1 else re.IGNORECASE
    for match in re.finditer(pattern, text, case):
        start, end = match.span()
        left, right = text[max(start - 2, 0) : start], text[end : end + 2][::-1]
        if not (_continues(left, match[0][0]) or _continues(right, match[0][-1])):
            yield start, end


def _continues(beside: str, edge: str) -> bool:
    """Tells whether the character `edge` and the adjacent text belong to one word or number."""
    near, further = beside[-1:], beside[-2:-1]
    if edge.isdigit() and near in tuple(".,"):
        return further.isdigit()
    if not near or _UNSPACED.match(edge) or _UNSPACED.match(near):
        return False
    return _is_leak_word_character(edge) and _is_leak_word_character(near)


def _is_leak_word_character(char: str) -> bool:
    return char.isalnum() or char == "_" or unicodedata.category(char)[0] == "M"
