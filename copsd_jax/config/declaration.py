"""The declaration of one setting: default, comment, allowed values, and when it is read."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

LARGEST = 2**31 - 1  # of a whole number from which arrays or random keys are made


class Choices(NamedTuple):
    """The values of a setting that is a name.

    Attributes:
      names: the choices; () if they are the entries of a table of the package.
      table: file and name of that table. Nothing here imports it: `setting_rules.check` gets its
        entries from the caller.
      function: whether "module:function" of the user's own is a choice too.
    """

    names: tuple[str, ...] = ()
    table: str = ""
    function: bool = False


class Range(NamedTuple):
    """The values of a setting that is a number.

    Attributes:
      words: the range, to stand behind "it must be".
      holds: whether a number is in the range.
      largest: the largest whole number, besides.
    """

    words: str
    holds: Callable[[Any], bool]
    largest: int = LARGEST


class Condition(NamedTuple):
    """When a setting is read: in words, and as a function of all settings by name."""

    words: str
    holds: Callable[[Mapping[str, Any]], bool]


class ListedBy(NamedTuple):
    """The condition that the chosen entry of a table lists the setting among those it reads.

    Attributes:
      setting: the one that chooses the entry, such as context.kind.
    """

    setting: str


Allowed = Choices | Range | None
When = Condition | ListedBy


class Setting(NamedTuple):
    """One setting of a run.

    Attributes:
      default: its value in `default()`; all its values have the same type.
      comment: its meaning, for `--help` and the documentation.
      allowed: its choices or its range; None where the type is enough.
      read_when: conditions that all have to hold for a method to read it. Elsewhere a value other
        than the default is refused, since whoever sets it expects an effect.
    """

    default: Any
    comment: str
    allowed: Allowed
    read_when: tuple[When, ...]


def declare(default: Any, comment: str, allowed: Allowed = None, *read_when: When) -> Setting:
    """Returns a Setting; its conditions are the last arguments."""
    return Setting(default, comment, allowed, read_when)


def one_of(*names: str, function: bool = False) -> Choices:
    """Returns choices that are listed here."""
    return Choices(names, function=function)


def entry_of(table: str, function: bool = False) -> Choices:
    """Returns the choices of a table of the package, such as "teaching/contexts.py CONTEXTS"."""
    return Choices(table=table, function=function)


def goes_with(setting: str, *values: object) -> Condition:
    """Returns the condition that another setting has one of these values."""
    return Condition(f"{setting}={' or '.join(map(str, values))}", lambda s: s[setting] in values)


def whole(least: int, largest: int = LARGEST) -> Range:
    """Returns the range of a whole number."""
    return Range(f"at least {least}", lambda value: value >= least, largest)


def between(least: float, most: float, remark: str = "") -> Range:
    """Returns a range with both ends in it."""
    return Range(f"between {least:g} and {most:g}{remark}", lambda value: least <= value <= most)


POSITIVE = Range("a positive number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("at least 0, and finite", lambda value: 0 <= value < math.inf)
FINITE = Range("finite", math.isfinite)
BELOW_ONE = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Range("above 0 and at most 1 (1 is off)", lambda value: 0 < value <= 1)
# Smaller temperatures leave float32 no digits for other logits than the largest.
TEMPERATURE = Range(
    "0 (greedy) or at least 0.0001, and finite", lambda value: not value or 1e-4 <= value < math.inf
)
DUAL_CLIP = Range("above 1 (0 is off)", lambda value: value == 0 or 1 < value < math.inf)


def server(section: str, timeout: float, concurrency: int, read_when: When) -> dict[str, Setting]:
    """Returns the settings of a section that asks a server, by name; only defaults differ."""
    found = {
        "url": declare("", "base address of the server: http://host:8000/v1"),
        "model": declare("", "name of the (base) model at the server"),
        "key_env": declare("", "environment variable with the key; '' for none"),
        "timeout": declare(timeout, "seconds for one request, time in the server's queue included",
            POSITIVE),
        "retries": declare(4, "how often a failed request is sent again", whole(0)),
        "backoff": declare(1.0, "seconds before the first retry; doubled for each further one",
            NOT_NEGATIVE),
        "concurrency": declare(concurrency, "requests in flight at once", whole(1, 1000)),
    }  # fmt: skip
    return {f"{section}.{k}": one._replace(read_when=(read_when,)) for k, one in found.items()}
