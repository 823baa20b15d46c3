"""The values of records' fields, and their conversion to text."""

import decimal
import json
import math
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np

from copsd_jax.problems import record_files

_ANSWERS = ("answer", "Answer")


class UnusableValue(Exception):
    """A record cannot become a row; the message is the reason under which the record is counted."""


def is_blank(value: object) -> bool:
    """Returns whether a value counts as absent: None, NaN, or a text without visible characters."""
    if isinstance(value, float | np.floating | decimal.Decimal):
        return math.isnan(value)
    return value is None or (isinstance(value, str | bytes) and not value.strip())


def convert_problem_field(name: str, value: object) -> str:
    """Converts a field's value to text in NFC without surrounding blanks.

    An answer may also be a list of tool calls, each with an `Action`; the list becomes JSON text.

    Raises:
      UnusableValue: the value is missing, empty or not text.
    """
    if isinstance(value, record_files.Unusable):
        raise UnusableValue(value.reason)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnusableValue(f"{name} is not UTF-8") from error
    if is_blank(value):
        raise UnusableValue(f"{name} is {'empty' if isinstance(value, str) else 'missing'}")
    if name in _ANSWERS and _is_record_call_list(value):
        value = json.dumps(value, ensure_ascii=False, default=_spell_other)
    if isinstance(value, int | float | np.number | decimal.Decimal) and not isinstance(value, bool):
        value = _spell_number(name, value)
    if not isinstance(value, str):
        kind = value.type if isinstance(value, record_files.Unread) else type(value).__name__
        raise UnusableValue(f"{name} is not text ({kind})")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise UnusableValue(f"{name} contains half a character (a lone surrogate)")
    # NFC gives each letter one spelling; most tokenizers encode other spellings differently.
    return unicodedata.normalize("NFC", value.strip())


def _is_record_call_list(value: object) -> bool:
    """Returns whether a value is a list of tool calls, as in ToolAlpaca."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, dict) and isinstance(x.get("Action"), str) for x in value)
    )


def _spell_other(value: object) -> Any:
    return float(value) if isinstance(value, decimal.Decimal) else str(value)


def _spell_number(name: str, value: Any) -> str:
    """Writes a number in digits; a whole number has no decimal point."""
    if isinstance(value, int | np.integer):
        return str(int(value))
    if not math.isfinite(value):
        raise UnusableValue(f"{name} is {value}")
    # int(1e23) would be 99999999999999991611392, so the shortest decimal form gives the digits.
    exact = value if isinstance(value, decimal.Decimal) else decimal.Decimal(str(value))
    if abs(exact.adjusted()) > record_files.DIGITS:
        raise UnusableValue(f"{name} has more than {record_files.DIGITS:,} digits")
    if exact == exact.to_integral_value():
        return str(int(exact))
    return f"{value:f}" if isinstance(value, decimal.Decimal) else str(value)


def is_true(flag: object) -> bool:
    """Returns whether a quality flag is true: True, 1, or the text "true"."""
    number = isinstance(flag, bool | np.bool_ | int | float | np.number)
    return (number and flag == 1) or (isinstance(flag, str | bytes) and flag in ("true", b"true"))


def list_options(name: str, value: Any) -> Iterator[str]:
    """Yields the texts of options, from a list, or from an object such as {"text": [...]}."""
    pending = [value]  # a list, because deeply nested JSON could exceed Python's recursion limit
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [x for key, x in item.items() if key not in ("label", "labels")]
        elif isinstance(item, list | np.ndarray):
            pending += item if isinstance(item, list) else item.ravel().tolist()
        elif not is_blank(item):
            yield convert_problem_field(name, str(item) if isinstance(item, bool) else item)
