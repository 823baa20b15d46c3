"""The declaration of one setting: its default, comment, allowed values, and conditions."""

import datetime
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

LARGEST = 2**31 - 1  # largest integer that arrays and random keys accept


class Choices(NamedTuple):
    """The allowed values of a setting whose value is a name.

    Attributes:
      names: the choices; () if the choices are the entries of a table in the package.
      table: the table's file and name; "" if the choices are in `names`. This module imports no
        tables; the caller passes the entries of each table to `setting_rules.check_settings`.
      function: whether the value may also be the user's own function, written as "module:function".
    """

    names: tuple[str, ...] = ()
    table: str = ""
    function: bool = False


class Range(NamedTuple):
    """The allowed values of a setting whose value is a number or a date.

    Attributes:
      words: the words that describe the range in the sentence "it must be ...".
      holds: a function that returns whether a value is in the range.
      largest: an additional upper limit for integers.
    """

    words: str
    holds: Callable[[Any], bool]
    largest: int = LARGEST


class Condition(NamedTuple):
    """A condition under which a setting is read.

    Attributes:
      words: the condition in words.
      holds: a function that takes all settings by name, and returns whether the condition is true.
    """

    words: str
    holds: Callable[[Mapping[str, Any]], bool]


class ListedBy(NamedTuple):
    """The condition that the chosen entry of a table reads a setting.

    Attributes:
      setting: the name of the setting that chooses the table's entry, such as context.kind.
    """

    setting: str


Allowed = Choices | Range | None
When = Condition | ListedBy


class Setting(NamedTuple):
    """One setting of a run.

    Attributes:
      default: the default value; every other value must have the same type.
      comment: the meaning of the setting, for `--help all` and the documentation.
      allowed: the choices or the range; None if every value of the type is allowed.
      read_when: the conditions under which the setting is read; all of them must be true. If a
        condition is false, every value except the default is refused, because such a value has no
        effect.
    """

    default: Any
    comment: str
    allowed: Allowed
    read_when: tuple[When, ...]


def declare(default: Any, comment: str, allowed: Allowed = None, *read_when: When) -> Setting:
    """Returns a `Setting`; the arguments after `allowed` are the conditions in `read_when`."""
    return Setting(default, comment, allowed, read_when)


def one_of(*names: str, function: bool = False) -> Choices:
    """Returns the `Choices` that consist of the given names."""
    return Choices(names, function=function)


def entry_of(table: str, function: bool = False) -> Choices:
    """Returns `Choices` made of the entries of a table, such as "teaching/contexts.py CONTEXTS"."""
    return Choices(table=table, function=function)


def goes_with(setting: str, *values: object) -> Condition:
    """Returns the condition that the setting named `setting` has one of the given values."""
    return Condition(f"{setting}={' or '.join(map(str, values))}", lambda s: s[setting] in values)


def whole(least: int, largest: int = LARGEST) -> Range:
    """Returns the range of integers from `least` to `largest`."""
    return Range(f"at least {least}", lambda value: value >= least, largest)


def between(least: float, most: float, remark: str = "") -> Range:
    """Returns the range from `least` to `most`, including both ends."""
    return Range(f"between {least:g} and {most:g}{remark}", lambda value: least <= value <= most)


POSITIVE = Range("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("at least 0, and finite", lambda value: 0 <= value < math.inf)
FINITE = Range("finite", math.isfinite)
BELOW_ONE = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Range("above 0 and at most 1 (1 is off)", lambda value: 0 < value <= 1)
# At temperatures below 0.0001, logits divided by the temperature are so large that float32 has too
# few digits for their differences.
TEMPERATURE = Range(
    "0 (greedy) or at least 0.0001, and finite", lambda value: not value or 1e-4 <= value < math.inf
)


def _is_date(value: str) -> bool:
    try:
        return not value or datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def _is_step_range(value: str) -> bool:
    first, _, last = value.partition(":")
    whole = all(part.isascii() and part.isdigit() for part in (first, last))
    return not value or (whole and 1 <= int(first) <= int(last))


STEP_RANGE = Range("the first and the last of some steps, such as 3:5, or ''", _is_step_range)
DATE = Range("a date such as 2026-01-31, or ''", _is_date)
DUAL_CLIP = Range("above 1 (0 is off)", lambda value: value == 0 or 1 < value < math.inf)


def server(section: str, timeout: float, concurrency: int, read_when: When) -> dict[str, Setting]:
    """Returns the settings for requests to a server, by name; each name begins with `section`."""
    found = {
        "url": declare("", "base address of the server, such as http://host:8000/v1"),
        "model": declare("", "name of the (base) model on the server"),
        "key_env": declare("", "environment variable that contains the key; '' for no key"),
        "timeout": declare(timeout, "seconds for one request, including time in the server's queue",
            POSITIVE),
        "retries": declare(4, "maximum number of retries of a failed request", whole(0)),
        "backoff": declare(1.0, "seconds before the first retry; doubled before each further retry",
            NOT_NEGATIVE),
        "concurrency": declare(concurrency, "maximum number of requests in flight", whole(1, 1000)),
    }  # fmt: skip
    return {f"{section}.{k}": one._replace(read_when=(read_when,)) for k, one in found.items()}
