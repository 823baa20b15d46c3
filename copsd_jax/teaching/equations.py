"""A parser of equations between numbers in a text.

The parser computes all values itself, so text that a model has written is never executed.
"""

import fractions
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from copsd_jax.rewards import numerals

_Value = fractions.Fraction | None  # None after a division by zero


class Equation(NamedTuple):
    """An equation between numbers: its span [start, end) in a text, and its computed values."""

    start: int
    end: int
    value: _Value  # the value of the last side
    true: bool  # whether all sides are equal
    results: tuple[_Value, ...]  # the result of every operation, in order


TOKEN = re.compile(
    r"""(?P<bullet> ^[^\S\n]*[-*+•][^\S\n]+ )
    | (?P<number> \d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d) | \d+(?:[.,]\d+)? | \.\d+ | [\u1369-\u137c]+ )
    | (?P<blank> [^\S\n] | \\?[$€£] | \*\* )
    | (?P<sign> [-+*/−–－＋×·⋅＊÷／] | (?<![^\W\d_])[xX] | \\(?:times|cdot|div)(?![A-Za-z]) )
    | (?P<open> \( ) | (?P<close> \) ) | (?P<equal> =+ | ＝ )
    | (?P<other> . )""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)

SIGNS = {"+": "+", "-": "-", "/": "/"}  # all other signs mean multiplication
SIGNS |= {"＋": "+", "−": "-", "–": "-", "－": "-", "÷": "/", "／": "/", "\\div": "/"}

# A number that follows one of these characters is part of another term, as in x2, 2^3 and
# \frac{1}{2}3.
_NO_START = re.compile(r"[A-Za-z_^.}%!\\\])]")

_LONGEST = 20  # maximum length of a number, in characters

_MAX_OPERANDS = 64  # per side
_BRACKET_COST = 8  # a bracket counts as this many operands, which limits nesting
_END = ("end", "", -1, -1)


def find_equations(text: str) -> list[Equation]:
    r"""Finds a text's equations between numbers, such as "3 x 5 = 15 = 10 + 5", in order.

    Numbers are integers and decimals ("1,234.5", "3,5") in the digits of any script. The operations
    are `+ - * /`, also written as `x × · ÷ − \times \cdot \div`, with the usual precedence. An
    equation may contain brackets, and a minus sign before a number. At least one side of an
    equation has an operation. An equation cannot begin directly after an operation sign, so "x + 3
    + 4 = 9" has no equation: "3 + 4 = 9" follows a plus sign. Values are compared exactly, so "10 /
    3 = 3.33" is false.
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
    """Reads an equation at a token; returns the equation (or None) and the next token's index."""
    reader = _EquationReader(tokens, at - 1)
    sides = reader.read_behind(reader.side)
    while sides and reader.kind() == "equal" and (side := reader.read_behind(reader.side)):
        sides += side
    if len(sides) < 2 or not reader.results:
        return None, reader.at  # no equation starts inside the part that was read
    true = sides[0] is not None and len(set(sides)) == 1
    end = tokens[reader.at - 1][3]
    return Equation(tokens[at][2], end, sides[-1], true, tuple(reader.results)), reader.at


class _Unreadable(Exception):
    """An operand is missing or cannot be read."""


class _EquationReader:
    """A reader of an equation's sides; a side ends before a sign that has no operand after it."""

    def __init__(self, tokens: Sequence[_Token], at: int):
        self.tokens, self.at = tokens, at
        self.results: list[_Value] = []
        self._left = 0  # number of operands that the side may still have

    def kind(self) -> str:
        return self.tokens[self.at][0]

    def read_behind(self, read: Callable[[], _Value]) -> list[_Value]:
        """Calls `read` at the next token; if `read` fails, returns [] and leaves `at` unchanged."""
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
        """Evaluates operands that are joined by signs of equal precedence, from left to right."""
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
            return _read_equation_number(written)
        if SIGNS.get(written) == "-" and self.kind() == "number" and self.tokens[self.at][2] == end:
            value = self._operand()
            return None if value is None else -value
        if kind == "open":
            value = self._row("+-")
            if self.kind() == "close":
                self.at += 1
                return value
        raise _Unreadable


def _read_equation_number(written: str) -> fractions.Fraction | None:
    digits = numerals.fold_digits(written)
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", digits):
        digits = digits.replace(",", "")
    digits = digits.replace(",", ".")
    if not re.fullmatch(r"\d*\.?\d+", digits):  # Ge'ez digits that do not form a number
        raise _Unreadable
    return fractions.Fraction(digits)


def _apply(sign: str, left: _Value, right: _Value) -> _Value:
    if left is None or right is None or (sign == "/" and right == 0):
        return None
    if sign in "+-":
        return left + right if sign == "+" else left - right
    return left * right if sign == "*" else left / right
