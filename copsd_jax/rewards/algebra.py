"""Comparison of formulas by math-verify, with stricter tests; imported only by worker processes.

math-verify compares numbers after rounding to six decimals, so 1/3^60 equals 1/3^61. math-verify
ignores the case of letters. Every word that looks like a unit is dropped, so "8 ab" equals 8. A
relation without variables becomes a truth value, so 3 = 3 equals every true statement.
"""

import functools
from collections.abc import Callable
from typing import Any

import latex2sympy2_extended.latex2sympy2
import math_verify
import math_verify.parser
import sympy

_DIGITS = 50
# Two values agree if their relative difference is at most _EXACT. If one of the values is a
# decimal, which may be rounded, the limit is _ROUNDED.
_EXACT = sympy.Rational(1, 10**25)
_ROUNDED = sympy.Rational(2, 10**6)
_POINTS = (sympy.Rational(37, 29), sympy.Rational(113, 47))


def build_comparison() -> Callable[[str, str, bool], str]:
    """Builds the function that compares two formulas, strictly or as math-verify does.

    The function returns `equal`, `unequal` or `unparsed`.
    """
    parser: Any = math_verify.parser
    published = parser.latex2sympy
    conversion = latex2sympy2_extended.latex2sympy2.ConversionConfig(lowercase_symbols=False)
    strictly = functools.partial(published, conversion_config=conversion)
    normalization = latex2sympy2_extended.NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    reading = {
        True: [math_verify.LatexExtractionConfig(normalization_config=normalization)],
        False: [math_verify.LatexExtractionConfig()],
    }

    def compare(gold: str, answer: str, strict: bool) -> str:
        wanted = strictly if strict else published
        if parser.latex2sympy is not wanted:
            parser.latex2sympy = wanted
            parser.parse_latex_cached.cache_clear()
        left, right = (
            math_verify.parse(
                f"${text}$", reading[strict], fallback_mode="no_fallback", parsing_timeout=0
            )
            for text in (gold, answer)
        )
        if not left or not right:
            return "unparsed"
        same = math_verify.verify(left, right, timeout_seconds=0)
        if same and strict:
            same = check_strictly(left[0], right[0])
        return "equal" if same else "unequal"

    return compare


def check_strictly(gold: Any, answer: Any) -> bool:
    """Tells whether two objects that math-verify accepts as equal also pass a stricter test."""
    if isinstance(gold, sympy.Rel) and isinstance(answer, sympy.Rel):
        if gold.free_symbols or answer.free_symbols:
            return True
        pairs = zip(gold.args, answer.args, strict=True)
        return all(_agree(one, other) for one, other in pairs)
    ordered = (sympy.Tuple, sympy.MatrixBase, sympy.MatrixExpr)
    if isinstance(gold, sympy.FiniteSet) and isinstance(answer, ordered):
        return False
    if isinstance(answer, sympy.FiniteSet) and isinstance(gold, ordered):
        return False
    if isinstance(gold, sympy.Tuple) and isinstance(answer, sympy.Tuple):
        return len(gold) == len(answer) and all(map(check_strictly, gold.args, answer.args))
    if isinstance(gold, sympy.FiniteSet) and isinstance(answer, sympy.FiniteSet):
        return _match_sets(list(gold.args), list(answer.args))
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape == answer.shape and all(map(_agree, gold.flat(), answer.flat()))
    return _agree(gold, answer)


def _match_sets(gold: list, answer: list) -> bool:
    """Tells whether the elements of two sets form pairs of equal elements."""
    left = list(answer)
    for element in gold:
        match = next((other for other in left if check_strictly(element, other)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _agree(gold: Any, answer: Any) -> bool:
    """Tells whether two expressions have equal values if fixed numbers replace the variables."""
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return True
    symbols: Any = sorted(gold.free_symbols | answer.free_symbols, key=str)
    rounded = gold.has(sympy.Float) or answer.has(sympy.Float)
    for start in _POINTS[: 2 if symbols else 1]:
        point: Any = {symbol: start + index for index, symbol in enumerate(symbols)}
        try:
            one, other = (side.subs(point).evalf(_DIGITS) for side in (gold, answer))
        except (ValueError, TypeError, ArithmeticError, AttributeError, NotImplementedError):
            return True  # the values at this point cannot be compared
        if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
            return True
        size = max(abs(one), abs(other))
        if size and abs(one - other) > size * (_ROUNDED if rounded else _EXACT):
            return False
    return True
