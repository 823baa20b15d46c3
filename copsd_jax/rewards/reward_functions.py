r"""Rewards of completions: a number, a status and a feedback text, by the kinds of `REWARDS`.

A feedback text may enter the teacher's context. It says what is wrong with a completion, and never
what would be right. Nothing that a model wrote is ever executed.

Departures from the SDPO environments (arXiv 2601.20802): the text of a think block is no answer. A
choice may be written "(B)", "B." or "B) text"; they take exact equality. The arguments of a call
end with their JSON, not at the first brace. A call that cannot be read has a status of its own. A
gold answer that cannot be read is an error.
"""

import collections
import dataclasses
import functools
import importlib
import inspect
import json
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from copsd_jax.rewards import graders

STATUSES = (
    *graders.STATUSES,
    "unclosed",  # <answer> is never closed
    "not_a_choice",  # the content of <answer> is no single letter
    "malformed",  # a tool call cannot be read
    "computed",  # the function of reward.kind returned the reward
    "raised",  # that function raised; the status goes on with ":" and the exception's type
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The grading of one completion.

    Attributes:
      reward: a finite number; 1 for a right and 0 for a wrong answer, except for a user's function.
      correct: whether the answer is right; None for a user's function.
      answer: the answer as written, or None. For a choice its letter; for tool calls the names and
        the merged arguments.
      status: one of `STATUSES`; "raised" is followed by the exception's type ("raised:KeyError").
      feedback: sentences about the completion, without the gold answer; may be empty.
    """

    reward: float
    correct: bool | None
    answer: str | None
    status: str
    feedback: str


@dataclasses.dataclass(frozen=True)
class Rewarder:
    """A kind of reward with its settings, from `build_rewarder`."""

    kind: str
    grader: graders.Grader
    form: str
    function: Callable | None  # of a kind "module:function"

    def score(self, golds: Sequence[str], texts: Sequence[str]) -> list[Verdict]:
        """Scores texts against gold answers, in their order.

        Args:
          golds: the gold answers.
          texts: the completions. If the prompt opened a think block, `<think>` is in front.

        Raises:
          ValueError: the numbers differ, or the kind cannot read a gold answer.
          TypeError: the user's function returned neither a number nor (number, text).
        """
        if len(golds) != len(texts):
            raise ValueError(f"{len(golds)} gold answers and {len(texts)} texts do not pair")
        if self.function is None:
            return REWARDS[self.kind].score(self, golds, texts)
        pairs = zip(golds, texts, strict=True)
        return [_compute_verdict(self.kind, self.function, *pair) for pair in pairs]


def build_rewarder(kind: str, grader: graders.Grader, form: str = "") -> Rewarder:
    r"""Builds the rewarder of `reward.kind`.

    Args:
      kind: a key of `REWARDS`, or "module:function" for an importable f(gold, text) that returns a
        number or (number, feedback).
      grader: extracts and compares answers, for the kind "answer"; the caller closes it.
      form: how an answer is written, with `{}` in its place, as the feedback names it.

    Raises:
      ValueError: the kind is unknown, or its function cannot be imported.
    """
    return Rewarder(kind, grader, form, import_function(kind))


def _shorten(text: str, shown: int = 200) -> str:
    """Shortens a text to one line of at most `shown` characters, for a feedback text."""
    line = " ".join(text.split())
    return line if len(line) <= shown else line[:shown] + "…"


def _drop_thinking(text: str) -> str:
    """Drops the thinking; drops all if a think block is open, since no answer is given yet."""
    after = text.rpartition("</think>")[2]
    return "" if "<think>" in after else after


def _fail(status: str, feedback: str) -> Verdict:
    """Returns the verdict of a text without a readable answer."""
    return Verdict(0.0, False, None, status, feedback)


def _score_each(judge: Callable, rewarder: Rewarder, golds, texts) -> list[Verdict]:
    """Scores each text by `judge`, with its gold answer as the kind reads it."""
    pairs = enumerate(zip(golds, texts, strict=True))
    return [judge(_read_gold(rewarder.kind, gold, f"pair {k}"), text) for k, (gold, text) in pairs]


def _read_gold(kind: str, gold: str, where: str) -> Any:
    read = REWARDS[kind].read_gold
    try:
        return read(gold) if read else gold
    except ValueError as error:
        raise ValueError(
            f"reward.kind is {kind!r}: the gold answer {_shorten(gold)!r} of {where} cannot be "
            f"read: {error}"
        ) from error


# ---- final answers ---------------------------------------------------------------------------


def _score_answers(rewarder: Rewarder, golds: Sequence[str], texts: Sequence[str]) -> list[Verdict]:
    grades = rewarder.grader.grade_all(zip(golds, texts, strict=True))
    return [
        Verdict(float(g.correct), g.correct, g.answer, g.status, _describe(g, rewarder.form))
        for g in grades
    ]


def _describe(grade: graders.Grade, form: str) -> str:
    if grade.answer is None:
        shown = '"' + form.format("...").removesuffix(".") + '"' if form else "that was asked for"
        return f"There is no final answer of the form {shown}."
    if grade.status in graders.UNRESOLVED:
        return f"The answer {_shorten(grade.answer)} could not be checked."
    if grade.correct:
        return "The answer is right."
    return f"The answer {_shorten(grade.answer)} is wrong."


# ---- multiple choice -------------------------------------------------------------------------

# "B", "B.", "B) text", "(B)", "(B) text"; not "B text", which may be a sentence ("A cat ...").
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?=[.):]|$))[.):]?(?:\s+\S.*)?", re.DOTALL)


def _read_letter(text: str) -> str:
    match = _LETTER.fullmatch(text.strip())
    if match is None:
        raise ValueError("it is not the letter of a choice")
    return (match[1] or match[2]).upper()


def _score_choice(gold: str, text: str) -> Verdict:
    """Compares the letter in the last <answer>...</answer> with `gold`."""
    _, tag, rest = _drop_thinking(text).rpartition("<answer>")
    content, closed, _ = rest.partition("</answer>")
    if not tag:
        return _fail("no_answer", "There is no <answer>.")
    if not closed:
        return _fail("unclosed", "The <answer> is never closed.")
    try:
        answer = _read_letter(content)
    except ValueError as error:
        return _fail("not_a_choice", f"The answer is {_shorten(content)!r}: {error}.")
    right = answer == gold
    feedback = "The answer is right." if right else f"The answer {answer} is wrong."
    return Verdict(float(right), right, answer, "plain", feedback)


# ---- tool calls ------------------------------------------------------------------------------

_MARK = re.compile(r"\bAction(?P<input> Input)?:")

# The counts of names, and the arguments of all calls together: names to values as JSON text, since
# Python takes True for 1. If several arguments have one name the last counts, as published.
_Calls = tuple[collections.Counter[str], dict[str, str]]


def _read_decimal(digits: str) -> int | float:
    value = float(digits)
    return int(value) if value.is_integer() else value  # 1.0 and 1 are one number


_DECODER = json.JSONDecoder(parse_float=_read_decimal)
_write_json = functools.partial(json.dumps, sort_keys=True, ensure_ascii=False)


def _canonicalize(arguments: object) -> dict[str, str]:
    if not isinstance(arguments, dict):
        raise ValueError("it is no object")
    return {name: _write_json(value) for name, value in arguments.items()}


def _read_calls(text: str) -> _Calls:
    """Reads all `Action: name` and `Action Input: {...}` of a text.

    Raises:
      ValueError: says what is malformed.
    """
    names, arguments, inputs, at = collections.Counter(), {}, 0, 0
    while mark := _MARK.search(text, at):
        body = text[mark.end() :].lstrip()
        if mark["input"]:
            inputs += 1
            try:
                value, end = _DECODER.raw_decode(body)
                arguments |= _canonicalize(value)
            except (ValueError, RecursionError) as error:  # endless digits and nesting too
                reason = f"the JSON of `Action Input:` {inputs} is malformed: {error}"
                raise ValueError(reason) from error
            at = len(text) - len(body) + end  # a mark inside its strings is skipped
            continue
        at = mark.end()
        name = re.split("\n|Action Input:", text[at:], maxsplit=1)[0].strip(" \t\r`*\"'.,;")
        if not name:
            raise ValueError(f"`Action:` {names.total() + 1} names no function")
        names[name] += 1
    return names, arguments


def _read_gold_calls(gold: str) -> _Calls:
    """Reads calls from a text like a completion's, or ToolAlpaca's list of {"Action", ...}."""
    if not gold.lstrip().startswith("["):
        names, arguments = _read_calls(gold)
    else:
        names, arguments = collections.Counter(), {}
        for call in _DECODER.decode(gold):
            if not isinstance(call, dict) or not isinstance(call.get("Action"), str):
                raise ValueError("a call of the list has no Action")
            names[call["Action"]] += 1
            given = call.get("Action_Input")
            arguments |= _canonicalize(_DECODER.decode(given) if isinstance(given, str) else given)
    if not names:
        # Otherwise a completion without any call would equal it, with two empty dictionaries.
        raise ValueError("it has no Action")
    return names, arguments


def _score_calls(wanted: _Calls, text: str) -> Verdict:
    """Compares the counts of functions, and the arguments of all calls together."""
    try:
        names, arguments = _read_calls(_drop_thinking(text))
    except ValueError as error:
        reason = str(error)
        return _fail("malformed", f"{reason[0].upper()}{reason[1:]}.")
    if not names:
        return _fail("no_answer", "There is no `Action:` with a function.")
    named = ", ".join(sorted(names.elements()))
    given = "{" + ", ".join(f"{_write_json(k)}: {v}" for k, v in sorted(arguments.items())) + "}"
    given = given.encode("utf-8", "backslashreplace").decode()  # JSON can spell half a character
    right = (names, arguments) == wanted
    if right:
        feedback = "The calls are right."
    elif names != wanted[0]:
        feedback = f"The functions called ({_shorten(named)}) are not the right ones."
    else:
        feedback = f"The functions are right, the arguments {_shorten(given)} are wrong."
    return Verdict(float(right), right, f"{named} {given}", "plain", feedback)


# ---- a function named in the config ----------------------------------------------------------

# Exceptions that a function raises for a text of an unexpected form. Such texts are certain to
# come, and one of them must not end a run. Any other exception (a missing file, a wrong name, no
# memory) is a fault of the function or the machine, and ends the run with its traceback.
_TEXT_ERRORS = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError)


# Exceptions that the import of a user's module can raise.
IMPORT_ERRORS = (
    ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError,
    ArithmeticError, RuntimeError, OSError,
)  # fmt: skip


def import_function(kind: str) -> Callable | None:
    """Imports the function of a kind "module:function"; returns None for a key of `REWARDS`.

    Raises:
      ValueError: the kind is unknown, or its function cannot be imported; lists the choices.
    """
    if kind in REWARDS:
        return None
    module_name, _, name = kind.partition(":")
    try:
        if not name:  # a misspelt kind: not to be imported
            raise ValueError("it is none of these")
        function: Any = getattr(importlib.import_module(module_name), name)
        inspect.signature(function).bind("gold", "text")
    except IMPORT_ERRORS as error:
        raise ValueError(
            f"reward.kind is {kind!r}: the choices are {', '.join(REWARDS)}, or module:function of "
            f"an importable function of (gold, text); {error}"
        ) from error
    return function


def _compute_verdict(kind: str, function: Callable, gold: str, text: str) -> Verdict:
    try:
        result = function(gold, text)
    except _TEXT_ERRORS as error:
        return Verdict(0.0, None, None, f"raised:{type(error).__name__}", "")
    pair: Any = result if isinstance(result, tuple) else (result, "")
    typed = len(pair) == 2 and isinstance(pair[0], numbers.Real) and isinstance(pair[1], str)
    if not typed or not math.isfinite(pair[0]):
        raise TypeError(
            f"reward.kind is {kind!r}: it returned {result!r}, neither a finite number nor "
            "(number, text)"
        )
    return Verdict(float(pair[0]), None, None, "computed", pair[1])


# ---- the table -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reward:
    """An entry of `REWARDS`.

    Attributes:
      score: returns the verdicts of (rewarder, gold answers, texts).
      answer_forms: values of prompt.answer in which the answers can be asked for.
      read_gold: reads a gold answer, or raises ValueError; None if every text will do.
      settings: names of the settings that this kind reads and others do not.
    """

    score: Callable[[Rewarder, Sequence[str], Sequence[str]], list[Verdict]]
    answer_forms: tuple[str, ...]
    read_gold: Callable[[str], object] | None = None
    settings: tuple[str, ...] = ()


REWARDS: dict[str, Reward] = {
    "answer": Reward(_score_answers, graders.PATTERNS, settings=("eval.extract",)),
    "choice": Reward(
        functools.partial(_score_each, _score_choice), ("choice", "none"), _read_letter
    ),
    "tool_call": Reward(functools.partial(_score_each, _score_calls), ("none",), _read_gold_calls),
}


def check_gold_answers(kind: str, golds: Mapping[str, str], setting: str) -> None:
    """Refuses gold answers that the kind cannot read, before the first rollout.

    Args:
      kind: the value of reward.kind.
      golds: gold answers by the row's id.
      setting: the setting that the rows come from, such as data.path.

    Raises:
      ValueError: names the first such row.
    """
    if kind not in REWARDS:
        return
    for row, gold in golds.items():
        _read_gold(kind, gold, f"row {row!r} of {setting}")
