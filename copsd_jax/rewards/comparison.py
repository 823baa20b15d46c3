"""Comparison of two answers as strings, exact numbers, quantities and words.

`compare_plainly` decides most pairs. All pairs that `compare_plainly` cannot decide are formulas;
`graders.Grader` sends these pairs to a worker. The rules are strict: a list never equals a tuple, a
number in base 7 never equals a number in base 10, a word is never read as a product of letters, and
5 cm do not equal 5 m.
"""

import fractions
import functools
import re

from copsd_jax.rewards import notation, numerals, units

_LETTER = re.compile(r"\(?([A-J])\)?[.:)]?")
_LETTER_WITH_TEXT = re.compile(r"(?:\(([A-J])\)|([A-J])[.:)])[.:]?\s*\S.*", re.DOTALL)
_BASE = re.compile(r"([+-]?[0-9A-Fa-f]+)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))")
_CLOCK = re.compile(
    r"(\d{1,4}(?:\s*:\s*\d{1,4})+)\s*(?:(a|p)\.?\s?m\.?|(?:hours|uhr|h))?", re.IGNORECASE
)
_NAMED = re.compile(r"[A-Za-z](?:_(?:\w|\{\w+\}))?\s*=\s*(?P<value>[^=<>]+)")
_RELATION = re.compile(r"[=<>|:]|\\(?:le|ge|ne|mid|in|approx)(?![a-zA-Z])")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_MOST_WORDS = 8  # an answer with more words is prose


def normalize(text: str) -> str:
    """Normalizes an answer to the form in which two answers are compared as strings.

    Digits of every script become ASCII digits. A number loses its thousands separators, leading
    zeros, and trailing zeros after the decimal point. Any other text loses its blanks, except
    blanks between digits, because "1 1/2" is not 11/2. Words become lower case; the letters of
    formulas keep their case, because Q and q are two quantities.
    """
    return _normalize_folded(notation.fold(text))


def _normalize_folded(text: str) -> str:
    number = numerals.parse_number(text)
    if number:
        return number
    kept = re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"(\\[a-zA-Z]+) (?=[a-zA-Z])", "\\1\0", text))
    return kept.casefold() if is_words(text) else kept


def is_words(text: str) -> bool:
    """Tells whether a folded text consists of words, and is neither a formula nor a variable.

    A short ASCII token such as "ab" may be a product of variables. Therefore, a token of two or
    three ASCII letters counts as a word only if it contains e, i or o.
    """
    tokens = re.findall(r"[^\W\d_]+", _COMMAND.sub(" ", text))
    if not tokens or _COMMAND.search(text) or re.search(r"[\d=<>^_+*/{}]", text):
        return False
    return any(
        len(token) > 3 or (len(token) > 1 and (not token.isascii() or set("eioEIO") & set(token)))
        for token in tokens
    )


@functools.lru_cache(maxsize=100_000)
def is_readable(text: str) -> bool:
    r"""Tells whether an answer may have other notations of the same value, such as 0.5 for 1/2.

    An answer is not readable in each of these cases: it is prose (for example, a whole solution);
    it has several lines and no LaTeX; it is longer than `numerals.LONGEST`; its braces do not
    match; it has neither letters nor digits.
    """
    folded = notation.fold(text)
    if len(folded) > numerals.LONGEST or not re.search(r"[^\W_]", folded):
        return False
    if "\n" in text.strip() and "\\" not in text:
        return False
    braces = re.findall(r"\\.|([{}])", folded, re.DOTALL)
    if braces.count("{") != braces.count("}"):
        return False
    prose = len(re.findall(r"[^\W\d_]{2,}", _COMMAND.sub(" ", folded))) > _MOST_WORDS
    return not prose


def compare_plainly(gold: str, answer: str, policy: str = "words") -> bool | None:
    """Compares two answers by all rules that need no algebra; returns None if undecided.

    Args:
      gold: the gold answer.
      answer: the answer of the model.
      policy: a policy of `units.POLICIES`.
    """
    if gold.strip() == answer.strip():
        return True
    gold, answer = notation.fold(gold), notation.fold(answer)
    if _normalize_folded(gold) == _normalize_folded(answer):
        return True
    for rule in (_compare_choices, _compare_bases, _compare_clocks):
        same = rule(gold, answer)
        if same is not None:
            return same
    if numerals.parse_number(gold) and numerals.parse_number(answer):
        return False  # the normal forms differ
    same = _compare_quantities(gold, answer, policy)
    if same is None:
        same = _compare_words(gold, answer)
    return False if same is None and _differ_in_brackets(gold, answer) else same


def _compare_choices(gold: str, answer: str) -> bool | None:
    """Compares the letters of two choices, each written as "B", "(B)" or "B) text"."""
    letters = []
    for side in (gold, answer):
        bare, full = _LETTER.fullmatch(side), _LETTER_WITH_TEXT.fullmatch(side)
        if not bare and not full:
            return None
        letters.append(bare[1] if bare else full[1] or full[2] if full else "")
    return letters[0] == letters[1]


def _compare_bases(gold: str, answer: str) -> bool | None:
    """Compares two numbers if at least one is written with its base, such as 101_2."""
    left, right = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if left and right and (left[1].isdigit() or right[1].isdigit() or left[1] == right[1]):
        read = [(m[1].upper().lstrip("0"), int(m[2] or m[3])) for m in (left, right)]
        return read[0] == read[1]
    based, other = (left, answer) if left else (right, gold)
    if based and based[1].lstrip("+-").isdigit() and numerals.parse_exact(other) is not None:
        return False
    return None


def _compare_clocks(gold: str, answer: str) -> bool | None:
    """Compares times of day and ratios, such as 4:20 and 3:5:7."""
    left, right = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(answer)
    if left and right:
        read = [[int(part) for part in match[1].split(":")] for match in (left, right)]
        halves = {match[2].lower() for match in (left, right) if match[2]}
        return read[0] == read[1] and len(halves) < 2
    other = answer if left else gold
    return False if (left or right) and numerals.parse_exact(other) is not None else None


def _compare_quantities(gold: str, answer: str, policy: str) -> bool | None:
    """Compares two numbers, with or without units; returns None if undecided."""
    left, right = units.read_quantity(gold, policy), units.read_quantity(answer, policy)
    named = [_NAMED.fullmatch(side) for side in (gold, answer)]
    if left is None and named[0] and not named[1]:
        left = units.read_quantity(named[0]["value"].strip(), policy)
    if right is None and named[1] and not named[0]:
        right = units.read_quantity(named[1]["value"].strip(), policy)
    if left is None or right is None:
        return None
    if not units.agree(left, right, policy):
        percent = [q.units == {"percent"} for q in (left, right)]
        if policy != "same" or percent[0] == percent[1]:
            return False
    return _compare_values(left, right, policy)


def _compare_values(left: units.Quantity, right: units.Quantity, policy: str) -> bool | None:
    # In the gold answer, a comma counts as a decimal comma only beside a unit or noun, because
    # "3,5" alone may be a list. If the gold answer is a number, the other answer "3,5" is read as
    # 3.5.
    worded = bool(left.units or left.words)
    one = left.compute_value(comma=worded)
    if one is None:
        # Here, the gold answer may be a list. A pair of two lists is undecided.
        return None if right.compute_value(comma=False) is None else _decide_lists(left)
    other = right.compute_value(comma=True)
    if other is None:
        return None
    percents = [q.units == {"percent"} for q in (left, right)]
    if percents[0] != percents[1]:
        scaled = [v / 100 if p else v for v, p in zip((one, other), percents, strict=True)]
        return scaled[0] == scaled[1] or (policy != "same" and one == other)
    if one == other:
        return True
    whole = all(numerals.parse_number(q.number, comma=True) for q in (left, right))
    # A pair of unequal fractions is undecided, because 0.333333 may be a rounded 1/3.
    return False if whole or left.scale != right.scale else None


def _decide_lists(left: units.Quantity) -> bool | None:
    return False if numerals.parse_number(left.number, comma=True) else None


def _compare_words(gold: str, answer: str) -> bool | None:
    r"""Rejects unequal words, because math-verify would read words as products of letters."""
    words = [is_words(side) for side in (gold, answer)]
    if all(words):
        return False
    other = answer if words[0] else gold
    if any(words) and (other.replace(" ", "").isalpha() or units.read_quantity(other) is not None):
        return False
    return None


def _differ_in_brackets(gold: str, answer: str) -> bool:
    """Tells whether one side is a set of listed elements, and the other an ordered list."""
    kinds = []
    for side in (gold, answer):
        if _RELATION.search(side):
            return False
        if re.fullmatch(r"\\\{.*\\\}", side) and "\\cup" not in side:
            kinds.append("set")
        elif re.fullmatch(r"[(\[].*,.*[)\]]", side) and "\\cup" not in side:
            pieces = re.search(r"[)\]]\s*,\s*[(\[]", side)
            kinds.append("pieces" if pieces else "tuple")
        else:
            return False
    return sorted(kinds) == ["set", "tuple"]


def prepare_formula(text: str, policy: str) -> tuple[str, frozenset[str]]:
    """Prepares an answer for math-verify; returns (formula without its unit, units)."""
    folded = notation.fold(text)
    quantity = units.read_quantity(folded, policy)
    if quantity is not None and quantity.units != {"percent"}:
        value = quantity.compute_value(comma=False)
        if quantity.scale == 1 or value is None:
            return quantity.number, quantity.units
        return _format_answer_fraction(value), quantity.units
    body, stated = units.split_unit(folded)
    if "percent" in stated:
        return folded.replace("%", "\\%"), frozenset()
    return body, stated


def _format_answer_fraction(value: fractions.Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
