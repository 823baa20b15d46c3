"""A parser of equations between numbers in a text.

It is a small parser of our own: what a model wrote is never executed.
"""

import fractions
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from copsd_jax.rewards import graders

_Value = fractions.Fraction | None  # None where it divides by zero


class Equation(NamedTuple):
    """Characters [start, end) of an equation, and its values."""

    start: int
    end: int
    value: _Value  # of its last side
    true: bool  # all sides are equal
    results: tuple[_Value, ...]  # of every operation in it, in order


TOKEN = re.compile(
    r"""(?P<bullet> ^[^\S\n]*[-*+•][^\S\n]+ )
    | (?P<number> \d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d) | \d+(?:[.,]\d+)? | \.\d+ | [\u1369-\u137c]+ )
    | (?P<blank> [^\S\n] | \\?[$€£] | \*\* )
    | (?P<sign> [-+*/−–－＋×·⋅＊÷／] | (?<![^\W\d_])[xX] | \\(?:times|cdot|div)(?![A-Za-z]) )
    | (?P<open> \( ) | (?P<close> \) ) | (?P<equal> =+ | ＝ )
    | (?P<other> . )""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)

SIGNS = {"+": "+", "-": "-", "/": "/"}  # all others multiply
SIGNS |= {"＋": "+", "−": "-", "–": "-", "－": "-", "÷": "/", "／": "/", "\\div": "/"}

_NO_START = re.compile(r"[A-Za-z_^.}%!\\\])]")  # x2, 2^3, \frac{1}{2}3: part of something else

_LONGEST = 20  # characters of a number

_MAX_OPERANDS = 64  # of a side
_BRACKET_COST = 8  # a bracket counts as so many operands, so that few are nested
_END = ("end", "", -1, -1)


def find_equations(text: str) -> list[Equation]:
    r"""Finds the equations between numbers in a text, in order, as "3 x 5 = 15 = 10 + 5".

    Numbers are integers and decimals ("1,234.5", "3,5") in the digits of any script; operations
    are `+ - * /` and their other signs (`x × · ÷ − \times \cdot \div`) with the usual precedence,
    brackets and a sign in front of a number. At least one side has an operation. A side that
    follows an operation on something else belongs to no equation, as in "x + 3 + 4 = 9". Values
    are exact: "10 / 3 = 3.33" is false.
    """
    found = []
    tokens = [(str(m.lastgroup), m[0], m.start(), m.end()) for m in TOKEN.finditer(text)]
    tokens = [*(token for token in tokens if token[0] != "blank"), _END]
    at = 0
    while tokens[at] != _END:
        behind = at
        if _may_start(text, tokens, at):
            equation, behind = _read_equation(tokens, at)
            found += [equation] if equation else []
        at = max(behind, at + 1)
    return found


_Token = tuple[str, str, int, int]  # kind, text, start, end


def _may_start(text: str, tokens: Sequence[_Token], at: int) -> bool:
    kind, written, start, _ = tokens[at]
    if kind not in ("number", "open") and SIGNS.get(written) != "-":
        return False
    if start and _NO_START.match(text[start - 1]):
        return False
    return not at or tokens[at - 1][0] not in ("number", "sign", "close")


def _read_equation(tokens: Sequence[_Token], at: int) -> tuple[Equation | None, int]:
    """Reads the equation that begins with a token; returns it and the index of the next token."""
    reader = _Reader(tokens, at - 1)
    sides = reader.read_behind(reader.side)
    while sides and reader.kind() == "equal" and (side := reader.read_behind(reader.side)):
        sides += side
    if len(sides) < 2 or not reader.results:
        return None, reader.at  # no equation begins inside what was read either
    true = sides[0] is not None and len(set(sides)) == 1
    end = tokens[reader.at - 1][3]
    return Equation(tokens[at][2], end, sides[-1], true, tuple(reader.results)), reader.at


class _Unreadable(Exception):
    """No operand stands where one must."""


class _Reader:
    """A reader of sums, products and operands; a sign without an operand behind it ends a side."""

    def __init__(self, tokens: Sequence[_Token], at: int):
        self.tokens, self.at = tokens, at
        self.results: list[_Value] = []
        self._left = 0  # operands that the side may yet have

    def kind(self) -> str:
        return self.tokens[self.at][0]

    def read_behind(self, read: Callable[[], _Value]) -> list[_Value]:
        """Reads what stands behind a token; [], and still at the token, if it is unreadable."""
        before, count = self.at, len(self.results)
        self.at += 1
        try:
            return [read()]
        except _Unreadable:
            self.at = before
            del self.results[count:]
            return []

    def side(self) -> _Value:
        self._left = _MAX_OPERANDS
        return self._row("+-")

    def _row(self, signs: str) -> _Value:
        """Reads operands with signs of one precedence between them, from left to right."""
        read = self._operand if signs == "*/" else lambda: self._row("*/")
        value = read()
        while self.kind() == "sign":
            sign = SIGNS.get(self.tokens[self.at][1], "*")
            if sign not in signs or not (operand := self.read_behind(read)):
                break
            value = _apply(sign, value, *operand)
            self.results.append(value)
        return value

    def _operand(self) -> _Value:
        kind, written, _, end = self.tokens[self.at]
        self._left -= _BRACKET_COST if kind == "open" else 1
        self.at += 1
        if self._left < 0:
            raise _Unreadable
        if kind == "number" and len(written) <= _LONGEST:
            return _read_number(written)
        if SIGNS.get(written) == "-" and self.kind() == "number" and self.tokens[self.at][2] == end:
            value = self._operand()
            return None if value is None else -value
        if kind == "open":
            value = self._row("+-")
            if self.kind() == "close":
                self.at += 1
                return value
        raise _Unreadable


def _read_number(written: str) -> fractions.Fraction | None:
    digits = graders.fold_digits(written)
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", digits):
        digits = digits.replace(",", "")
    digits = digits.replace(",", ".")
    if not re.fullmatch(r"\d*\.?\d+", digits):  # Ge'ez digits that make no number
        raise _Unreadable
    return fractions.Fraction(digits)


def _apply(sign: str, left: _Value, right: _Value) -> _Value:
    if left is None or right is None or (sign == "/" and right == 0):
        return None
    if sign in "+-":
        return left + right if sign == "+" else left - right
    return left * right if sign == "*" else left / right
