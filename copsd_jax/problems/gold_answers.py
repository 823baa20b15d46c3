r"""The rules by which gold answers are taken from longer texts: data.answer and eval.answer.

`after:MARK` takes the text after the last MARK, `boxed` the content of the last `\boxed{}`, and
`pattern:REGEX` the first group of the first match. The package `regex` stops a search that takes
too long; a search of `re` cannot be stopped.
"""

import dataclasses
import time
import warnings
from typing import Any

from copsd_jax.problems import field_values

FORMS = "'', boxed, after:MARK or pattern:REGEX"
SEARCH_SECONDS = 1.0  # time limit of the search in one text
FILE_SECONDS = 60.0  # time limit of all searches in one source
_BOX = "\\boxed{"


@dataclasses.dataclass
class Rule:
    """A rule that takes the gold answer from a text.

    Attributes:
      setting: the name of the setting that gives the rule.
      value: the value of this setting.
      kind: boxed, after or pattern.
      argument: the mark, or the compiled pattern; None for boxed.
      left: seconds that remain for searches in this source.
    """

    setting: str
    value: str
    kind: str
    argument: Any = None
    left: float = FILE_SECONDS


def parse_rule(value: str, setting: str) -> Rule | None:
    """Returns the rule that the value of a setting describes; None for "".

    Raises:
      ValueError: the value has another form, or the pattern is not a regular expression with a
        group.
    """
    if not value:
        return None
    kind, _, argument = value.partition(":")
    if value != "boxed" and (kind not in ("after", "pattern") or not argument.strip()):
        raise ValueError(f"{setting} is {value!r}: it must be {FORMS}")
    if kind != "pattern":
        return Rule(setting, value, kind, argument)
    import regex  # imported lazily: few runs use a pattern

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets such as [[a], which may get a new meaning
            pattern = regex.compile(argument)
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{setting} is {value!r}: not a regular expression ({' '.join(str(error).split())})"
        ) from error
    if not pattern.groups:
        raise ValueError(
            f"{setting} is {value!r}: put the answer's part in parentheses, as a group"
        )
    return Rule(setting, value, kind, pattern)


def extract_gold(rule: Rule, name: str, text: str) -> tuple[str, str]:
    """Extracts the gold answer from a text.

    Args:
      rule: the rule.
      name: the name of the field, for error messages.
      text: the text of the field.

    Returns:
      The gold answer, and the solution in this text: the part before the mark, or the whole text.

    Raises:
      UnusableValue: the rule finds nothing in this text.
      ValueError: the search takes too long.
    """
    if rule.kind == "after":
        before, mark, gold = text.rpartition(rule.argument)
        found, steps = gold if mark else "", before.strip()
    else:
        found, steps = _read_box(text) if rule.kind == "boxed" else _search_gold(rule, text), text
    if not found.strip():
        raise field_values.UnusableValue(f"{rule.setting} finds nothing in the field {name!r}")
    return found.strip(), steps


def _search_gold(rule: Rule, text: str) -> str:
    started = time.monotonic()
    limit = min(SEARCH_SECONDS, rule.left)
    try:
        match = rule.argument.search(text, timeout=limit) if limit > 0 else None
    except TimeoutError:
        limit = 0.0
    rule.left -= time.monotonic() - started
    if limit <= 0:
        raise ValueError(
            f"{rule.setting} is {rule.value!r}: the search takes more than {SEARCH_SECONDS:g} s "
            f"in this text, or {FILE_SECONDS:g} s in the whole file; write a simpler pattern"
        )
    return (match and match[1]) or ""


def _read_box(text: str) -> str:
    """Returns the content of the last box, with its inner braces; "" if there is none."""
    start = text.rfind(_BOX)
    depth = 1
    for k in range(start + len(_BOX), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[k], 0) * (text[k - 1] != "\\")
        if not depth:
            return text[start + len(_BOX) : k]
    return ""
