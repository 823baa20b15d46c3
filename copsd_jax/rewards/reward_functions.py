r"""Rewards of completions: for each completion, a number, a status and a feedback text.

A feedback text may enter the teacher's context. The feedback says what is wrong with a completion,
but never gives the right answer. Text written by a model is never executed.

The rewards differ from those of the SDPO environments (arXiv 2601.20802) in these points:

- Text in a think block is not an answer.
- A choice may be written "(B)", "B.", "B) text" or "Ｂ"; SDPO requires exact equality.
- The JSON of a call may be in a code block of Markdown.
- The arguments of a call end where the JSON object ends, not at the first closing brace.
- A call that cannot be read has its own status.
- A gold answer that cannot be read raises an error.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import math
import numbers
import re
import reprlib
import signal
import traceback
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from copsd_jax.rewards import comparison, extraction, graders

STATUSES = (
    *graders.STATUSES,
    "unclosed",  # <answer> is never closed
    "not_a_choice",  # the content of <answer> is not a single letter
    "malformed",  # a tool call cannot be read
    "computed",  # the function of reward.kind returned the reward
    "raised",  # the function of reward.kind raised an exception ("raised:KeyError")
    "no_number",  # the function of reward.kind returned no finite number
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The grading of one completion.

    Attributes:
      reward: a finite number: 1 for a right answer, 0 for a wrong answer, or the value that a
        user's function returned.
      correct: whether the answer is right; None if a user's function computed the reward.
      answer: the answer as written, or None. For a choice, the answer is the letter. For tool
        calls, the answer consists of the function names and the merged arguments.
      status: one of `STATUSES`; "raised" is followed by the exception's type ("raised:KeyError").
      feedback: sentences about the completion, without the gold answer; may be empty.
      detail: one line about the exception or the value that a user's function gave instead of a
        reward; otherwise empty.
    """

    reward: float
    correct: bool | None
    answer: str | None
    status: str
    feedback: str
    detail: str = ""


def lacks_reward(status: str) -> bool:
    """Returns whether a status means that a user's function failed to return a finite number."""
    return status.partition(":")[0] in ("raised", "no_number")


@dataclasses.dataclass(frozen=True)
class Rewarder:
    """A kind of reward together with its settings; `build_rewarder` builds a rewarder."""

    kind: str
    grader: graders.Grader
    form: str
    function: Callable | None  # the user's function if the kind is "module:function"

    def score(self, golds: Sequence[str], texts: Sequence[str]) -> list[Verdict]:
        """Scores each text against the gold answer at the same position.

        Args:
          golds: the gold answers.
          texts: the completions. If a prompt opened a think block, the completion must begin with
            `<think>`.

        Raises:
          ValueError: the numbers of gold answers and texts differ, or a gold answer cannot be read.
        """
        if len(golds) != len(texts):
            raise ValueError(f"there are {len(golds)} gold answers but {len(texts)} texts")
        if self.function is None:
            return REWARDS[self.kind].score(self, golds, texts)
        pairs = zip(golds, texts, strict=True)
        return [_compute_verdict(self.function, *pair) for pair in pairs]


def build_rewarder(kind: str, grader: graders.Grader, form: str = "") -> Rewarder:
    r"""Builds the rewarder for a value of `reward.kind`.

    Args:
      kind: a key of `REWARDS`, or the name "module:function" of an importable function f(gold,
        text). This function returns a number or (number, feedback).
      grader: the grader of answers for the kind "answer"; the caller must close the grader.
      form: the answer form to show in the feedback text, with `{}` in place of the answer
        itself.

    Raises:
      ValueError: the kind is unknown, or the function cannot be imported.
    """
    return Rewarder(kind, grader, form, import_function(kind))


def _shorten(text: str, shown: int = 200) -> str:
    """Shortens a text to one line of at most `shown` characters, for a feedback text."""
    line = " ".join(text.split())
    return line if len(line) <= shown else line[:shown] + "…"


def _keep_gradable_text(text: str) -> str:
    """Returns the text after the thinking; returns "" if a think block is still open."""
    after = text.rpartition("</think>")[2]
    return "" if "<think>" in after else after


def _fail(status: str, feedback: str) -> Verdict:
    """Returns the verdict on a text that has no readable answer."""
    return Verdict(0.0, False, None, status, feedback)


def _score_each(judge: Callable, rewarder: Rewarder, golds, texts) -> list[Verdict]:
    """Scores each text by `judge(gold, text)`; `gold` is what the kind's `read_gold` returns."""
    pairs = enumerate(zip(golds, texts, strict=True))
    return [judge(_read_gold(rewarder.kind, gold, f"pair {k}"), text) for k, (gold, text) in pairs]


def _read_gold(kind: str, gold: str, where: str) -> Any:
    read = REWARDS[kind].read_gold
    try:
        return read(gold) if read else gold
    except (ValueError, RecursionError) as error:
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

# Matches "B", "B.", "B) text", "(B)" and "(B) text". "B text" does not match, because it may be a
# sentence ("A cat ...").
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?=[.):]|$))[.):]?(?:\s+\S.*)?", re.DOTALL)


def _read_letter(text: str) -> str:
    match = _LETTER.fullmatch(unicodedata.normalize("NFKC", text).strip())
    if match is None:
        raise ValueError("it is not the letter of a choice")
    return (match[1] or match[2]).upper()


def _score_choice(gold: str, text: str) -> Verdict:
    """Compares the letter in the last <answer>...</answer> with `gold`."""
    _, tag, rest = _keep_gradable_text(text).rpartition("<answer>")
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
_FENCE = re.compile(r"\s*(?:```\w*\s*)?")  # the JSON may be in a code block of Markdown

# The number of calls to each function, and the merged arguments of all calls as a dictionary.
# Argument values are kept as JSON text, because True equals 1 in Python. If several arguments have
# the same name, the last one counts, as in the SDPO environments.
_Calls = tuple[collections.Counter[str], dict[str, str]]


def _read_answer_number(digits: str) -> int | float:
    value = float(digits)
    return int(value) if value.is_integer() else value  # 1.0 and 1 are the same number


_DECODER = json.JSONDecoder(parse_float=_read_answer_number)
_write_json = functools.partial(json.dumps, sort_keys=True, ensure_ascii=False)


def _canonicalize(arguments: object) -> dict[str, str]:
    if not isinstance(arguments, dict):
        raise ValueError("it is no object")
    return {name: _write_json(value) for name, value in arguments.items()}


def _read_calls(text: str) -> _Calls:
    """Reads all parts `Action: name` and `Action Input: {...}` of a text.

    Raises:
      ValueError: a part is malformed; the message names the part.
    """
    names, arguments, inputs, at = collections.Counter(), {}, 0, 0
    while mark := _MARK.search(text, at):
        if mark["input"]:
            fence = _FENCE.match(text, mark.end())
            body = text[fence.end() if fence else mark.end() :]
            inputs += 1
            try:
                value, end = _DECODER.raw_decode(body)
                arguments |= _canonicalize(value)
            except (ValueError, RecursionError) as error:
                # A number with too many digits also raises ValueError; JSON that is nested too
                # deeply raises RecursionError.
                reason = f"the JSON of `Action Input:` {inputs} is malformed: {error}"
                raise ValueError(reason) from error
            at = len(text) - len(body) + end  # skips any `Action:` inside the JSON
            continue
        at = mark.end()
        name = re.split("\n|Action Input:", text[at:], maxsplit=1)[0].strip(" \t\r`*\"'.,;")
        if not name:
            raise ValueError(f"`Action:` {names.total() + 1} names no function")
        names[name] += 1
    return names, arguments


def _read_gold_calls(gold: str) -> _Calls:
    """Reads gold calls that are written like a completion or as a list of objects (ToolAlpaca)."""
    if not gold.lstrip().startswith("["):
        names, arguments = _read_calls(gold)
    else:
        names, arguments = collections.Counter(), {}
        for call in _DECODER.decode(gold):
            if not isinstance(call, dict) or not isinstance(call.get("Action"), str):
                raise ValueError("a call in the list has no Action")
            names[call["Action"]] += 1
            given = call.get("Action_Input")
            arguments |= _canonicalize(_DECODER.decode(given) if isinstance(given, str) else given)
    if not names:
        # Without a call in the gold answer, no completion could be right: a completion without
        # calls has the status no_answer.
        raise ValueError("a gold answer needs an Action")
    return names, arguments


def _score_calls(wanted: _Calls, text: str) -> Verdict:
    """Compares the number of calls to each function, and the merged arguments of all calls."""
    try:
        names, arguments = _read_calls(_keep_gradable_text(text))
    except ValueError as error:
        reason = str(error)
        return _fail("malformed", f"{reason[0].upper()}{reason[1:]}.")
    if not names:
        return _fail("no_answer", "There is no `Action:` with a function.")
    named = ", ".join(sorted(names.elements()))
    given = "{" + ", ".join(f"{_write_json(k)}: {v}" for k, v in sorted(arguments.items())) + "}"
    given = given.encode("utf-8", "backslashreplace").decode()  # JSON may contain lone surrogates
    right = (names, arguments) == wanted
    if right:
        feedback = "The calls are right."
    elif names != wanted[0]:
        feedback = f"The functions called ({_shorten(named)}) are not the right ones."
    else:
        feedback = f"The functions are right, the arguments {_shorten(given)} are wrong."
    return Verdict(float(right), right, f"{named} {given}", "plain", feedback)


# ---- a function named in the config ----------------------------------------------------------


def is_reward_function_error(error: BaseException) -> bool:
    """Returns whether an error comes from a user's module or function, and not from a signal.

    In a run, no signal raises KeyboardInterrupt, so this exception comes from the user's code.
    `signals.Stopped` comes from a signal, and must end the step.
    """
    if isinstance(error, KeyboardInterrupt):
        return signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    return isinstance(error, Exception | SystemExit | asyncio.CancelledError)


def import_function(kind: str) -> Callable | None:
    """Imports the function that "module:function" names; returns None for a key of `REWARDS`.

    Raises:
      ValueError: the kind is unknown, or the function cannot be imported; the message lists the
        choices.
    """
    if kind in REWARDS:
        return None
    module_name, _, name = kind.partition(":")
    try:
        if not name:  # a misspelt kind, which must not be imported
            raise ValueError("the kind is unknown")
        function: Any = getattr(importlib.import_module(module_name), name)
        inspect.signature(function).bind("gold", "text")
    except BaseException as error:
        if not is_reward_function_error(error):
            raise
        raise ValueError(
            f"reward.kind is {kind!r}: the choices are {', '.join(REWARDS)}, or module:function, "
            f"which names an importable function of (gold, text); {type(error).__name__}: {error}"
        ) from error
    return function


def _compute_verdict(function: Callable, gold: str, text: str) -> Verdict:
    """Scores a text by a user's function; an exception in one row must not end the run."""
    try:
        result = function(gold, text)
    except BaseException as error:
        if isinstance(error, MemoryError) or not is_reward_function_error(error):
            raise  # a lack of memory is a fault of the machine
        detail = "".join(traceback.format_exception_only(error))
        return _lack_reward(f"raised:{type(error).__name__}", detail)
    pair: Any = result if isinstance(result, tuple) else (result, "")
    returned = f"it returned a value of the type {type(result).__name__}"
    # Methods of the user's object may raise exceptions, and `repr` refuses very long integers (over
    # 4,300 digits).
    with contextlib.suppress(Exception):
        typed = len(pair) == 2 and isinstance(pair[0], numbers.Real) and isinstance(pair[1], str)
        if typed and math.isfinite(number := float(pair[0])):
            return Verdict(number, None, None, "computed", pair[1])
    with contextlib.suppress(Exception):
        returned = f"it returned {reprlib.repr(result)} ({type(result).__name__})"
    return _lack_reward("no_number", f"{returned} instead of a finite number or (number, text)")


def _lack_reward(status: str, detail: str) -> Verdict:
    line = _shorten(detail).encode("utf-8", "backslashreplace").decode()  # may have lone surrogates
    return Verdict(0.0, None, None, status, "", line)


# ---- the table -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reward:
    """An entry of `REWARDS`.

    Attributes:
      score: function of (rewarder, gold answers, texts) that returns one verdict per text.
      answer_forms: the values of prompt.answer for which this kind of reward can read answers.
      read_gold: function that reads a gold answer, and raises ValueError if the gold answer is
        invalid. None means that every text is a valid gold answer.
      settings: names of the settings that only this kind reads.
    """

    score: Callable[[Rewarder, Sequence[str], Sequence[str]], list[Verdict]]
    answer_forms: tuple[str, ...]
    read_gold: Callable[[str], object] | None = None
    settings: tuple[str, ...] = ()


REWARDS: dict[str, Reward] = {
    "answer": Reward(
        _score_answers, extraction.PATTERNS, settings=("eval.extract", "eval.grader", "eval.units")
    ),
    "choice": Reward(
        functools.partial(_score_each, _score_choice), ("choice", "none"), _read_letter
    ),
    "tool_call": Reward(functools.partial(_score_each, _score_calls), ("none",), _read_gold_calls),
}


def check_gold_answers(
    kind: str, golds: Mapping[str, str], setting: str, *, needed: bool = True
) -> None:
    """Checks before the first rollout that the kind of reward can read all gold answers.

    Args:
      kind: the value of reward.kind.
      golds: the gold answer of each row id.
      setting: name of the setting that the rows come from, such as data.path.
      needed: whether every row must have a gold answer.

    Raises:
      ValueError: a gold answer cannot be read; the message names the first row with such an answer.
        With the kind "answer", the error is raised only if no gold answer can be read.
    """
    unreadable = find_unreadable(kind, golds)
    if unreadable and kind != "answer":
        _read_gold(kind, golds[unreadable[0]], f"row {unreadable[0]!r} of {setting}")
    if unreadable and len(unreadable) == len(golds):
        blank = "" if needed else ", or be blank if the row is not to be graded"
        raise ValueError(
            f"{setting}: the grader cannot read any of the {len(golds)} gold answers, for example "
            f"{quote_golds(golds, unreadable)}; the field 'answer' must contain only the final "
            f"answer{blank}"
        )


def find_unreadable(kind: str, golds: Mapping[str, str]) -> list[str]:
    """Finds the rows whose gold answer the kind of reward cannot read.

    Args:
      kind: the value of reward.kind.
      golds: the gold answer of each row id.

    Returns:
      The ids of the rows; [] for the user's own function, which may read any text.
    """
    return [row for row, gold in golds.items() if kind in REWARDS and not _is_readable(kind, gold)]


def quote_golds(golds: Mapping[str, str], rows: Sequence[str]) -> str:
    """Returns the gold answers of the first three of the given rows, with the rows' ids.

    Args:
      golds: the gold answer of each row id.
      rows: the ids of the rows to quote.
    """
    return ", ".join(f"{_shorten(golds[row], 60)!r} of row {row!r}" for row in rows[:3])


def _is_readable(kind: str, gold: str) -> bool:
    if kind == "answer":
        return comparison.is_readable(gold)
    try:
        _read_gold(kind, gold, "")
    except ValueError:
        return False
    return True
