r"""A completion's reward, and what may be said of it: a number, a status and a feedback text.

A feedback text may enter the teacher's context, so it says what is wrong with a completion and
never what would have been right. Nothing that a model wrote is ever executed.

Departures from the SDPO environments (arXiv 2601.20802): what stands in a think block is no answer;
a choice may be written "(B)", "B." or "B) text" where they take exact equality; the arguments of a
call end where their JSON ends, not at the first brace; a call that cannot be read is counted as
such; a gold answer that cannot be read is an error.
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
from typing import Any, NamedTuple

from copsd_jax.rewards import graders

STATUSES = graders.STATUSES | {
    "unclosed": "<answer> is never closed",
    "not_a_choice": "what stands in <answer> is no single letter",
    "malformed": "a tool call that cannot be read",
    "computed": "the reward is what the function of reward.kind returned",
    "raised": "that function raised; the status goes on with `:` and the exception's type",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one completion.

    Attributes:
      reward: finite; 1 for a right and 0 for a wrong answer where the kind says which.
      correct: None where only a reward is known (a function of the user's).
      answer: as written (a choice: its letter; calls: names and merged arguments), or None.
      status: a key of STATUSES; of `raised`, with the exception's type ("raised:KeyError").
      feedback: sentences about the completion, without the gold answer; may be empty.
    """

    reward: float
    correct: bool | None
    answer: str | None
    status: str
    feedback: str


@dataclasses.dataclass(frozen=True)
class Rewarder:
    """Of `make`. `function` is None but for a kind "module:function"."""

    kind: str
    grader: graders.Grader
    form: str
    function: Callable | None

    def score(self, golds: Sequence[str], texts: Sequence[str]) -> list[Verdict]:
        """A verdict for each (gold, text), in their order.

        A text whose prompt opened a think block has `<think>` in front.

        Raises:
          ValueError: for unequal numbers, or a gold answer that the kind cannot read.
          TypeError: the user's function returned neither a number nor (number, text).
        """
        if len(golds) != len(texts):
            raise ValueError(f"{len(golds)} gold answers and {len(texts)} texts do not pair")
        if self.function is None:
            return REWARDS[self.kind].score(self, golds, texts)
        return [
            _computed(self.kind, self.function, *pair) for pair in zip(golds, texts, strict=True)
        ]


def make(kind: str, grader: graders.Grader, form: str = "") -> Rewarder:
    r"""The rewarder of `reward.kind`.

    Args:
      kind: a key of `REWARDS`, or "module:function" for an importable f(gold, text) that returns a
        number or (number, feedback).
      grader: finds and compares answers (kind answer); stays the caller's to close.
      form: how an answer is written, with `{}` for it (`prompts.ANSWERS`), for the feedback.

    Raises:
      ValueError: as `check`.
    """
    function = None if kind in REWARDS else _resolve(kind)
    return Rewarder(kind, grader, form, function)


def check(kind: str) -> None:
    """Refuses what `make` could not make, before anything is loaded.

    Raises:
      ValueError: with the choices, for a kind that is none of them.
    """
    if kind not in REWARDS:
        _resolve(kind)


def _brief(text: str, shown: int = 200) -> str:
    """On one line, and no longer than a feedback text should be."""
    line = " ".join(text.split())
    return line if len(line) <= shown else line[:shown] + "…"


def _visible(text: str) -> str:
    """What follows the last think block; nothing where one is open: no answer is given yet."""
    after = text.rpartition("</think>")[2]
    return "" if "<think>" in after else after


def _lost(status: str, feedback: str) -> Verdict:
    """Wrong, for want of an answer."""
    return Verdict(0.0, False, None, status, feedback)


def _each(read: Callable, judge: Callable, rewarder: Rewarder, golds, texts) -> list[Verdict]:
    """`judge` of each text and its gold answer as `read` gives it."""
    verdicts = []
    for index, (gold, text) in enumerate(zip(golds, texts, strict=True)):
        try:
            wanted = read(gold)
        except ValueError as error:
            raise ValueError(
                f"reward.kind is {rewarder.kind!r}: the gold answer of pair {index}, "
                f"{_brief(gold)!r}, cannot be read: {error}"
            ) from error
        verdicts.append(judge(wanted, text))
    return verdicts


# ---- final answers ---------------------------------------------------------------------------


def _answers(rewarder: Rewarder, golds: Sequence[str], texts: Sequence[str]) -> list[Verdict]:
    grades = rewarder.grader.grade_all(zip(golds, texts, strict=True))
    return [
        Verdict(float(g.correct), g.correct, g.answer, g.status, _about(g, rewarder.form))
        for g in grades
    ]


def _about(grade: graders.Grade, form: str) -> str:
    if grade.answer is None:
        shown = '"' + form.format("...").removesuffix(".") + '"' if form else "that was asked for"
        return f"There is no final answer of the form {shown}."
    if grade.status in graders.UNRESOLVED:
        return f"The answer {_brief(grade.answer)} could not be checked."
    if grade.correct:
        return "The answer is right."
    return f"The answer {_brief(grade.answer)} is wrong."


# ---- multiple choice -------------------------------------------------------------------------

# "B", "B.", "B) text", "(B)", "(B) text"; not "B text", which may be a sentence ("A cat ...").
_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?=[.):]|$))[.):]?(?:\s+\S.*)?", re.DOTALL)


def _letter(text: str) -> str:
    match = _LETTER.fullmatch(text.strip())
    if match is None:
        raise ValueError("it is not the letter of a choice")
    return (match[1] or match[2]).upper()


def _choice(gold: str, text: str) -> Verdict:
    """What stands between the last <answer> and its </answer>, as a letter, equals `gold`."""
    _, tag, rest = _visible(text).rpartition("<answer>")
    content, closed, _ = rest.partition("</answer>")
    if not tag:
        return _lost("no_answer", "There is no <answer>.")
    if not closed:
        return _lost("unclosed", "The <answer> is never closed.")
    try:
        answer = _letter(content)
    except ValueError as error:
        return _lost("not_a_choice", f"The answer is {_brief(content)!r}: {error}.")
    right = answer == gold
    feedback = "The answer is right." if right else f"The answer {answer} is wrong."
    return Verdict(float(right), right, answer, "plain", feedback)


# ---- tool calls ------------------------------------------------------------------------------

_MARK = re.compile(r"\bAction(?P<input> Input)?:")

# Names with their counts, and of each argument of all calls together its value as JSON text (Python
# would have True == 1). Of arguments with one name the last counts, as published.
_Calls = tuple[collections.Counter[str], dict[str, str]]


def _decimal(digits: str) -> int | float:
    value = float(digits)
    return int(value) if value.is_integer() else value  # 1.0 and 1 are one number


_DECODER = json.JSONDecoder(parse_float=_decimal)
_json = functools.partial(json.dumps, sort_keys=True, ensure_ascii=False)


def _canonical(arguments: object) -> dict[str, str]:
    if not isinstance(arguments, dict):
        raise ValueError("it is no object")
    return {name: _json(value) for name, value in arguments.items()}


def _calls(text: str) -> _Calls:
    """All `Action: name` and `Action Input: {...}` of a text.

    Raises:
      ValueError: saying what is malformed.
    """
    names, arguments, inputs, at = collections.Counter(), {}, 0, 0
    while mark := _MARK.search(text, at):
        body = text[mark.end() :].lstrip()
        if mark["input"]:
            inputs += 1
            try:
                value, end = _DECODER.raw_decode(body)
                arguments |= _canonical(value)
            except (ValueError, RecursionError) as error:  # endless digits and nesting among them
                reason = f"the JSON of `Action Input:` {inputs} is malformed: {error}"
                raise ValueError(reason) from error
            at = len(text) - len(body) + end  # past what stands in its strings
            continue
        at = mark.end()
        name = text[at:].split("\n", 1)[0].split("Action Input:")[0].strip(" \t\r`*\"'.,;")
        if not name:
            raise ValueError(f"`Action:` {names.total() + 1} names no function")
        names[name] += 1
    return names, arguments


def _gold_calls(gold: str) -> _Calls:
    """Calls as a text like a completion's, or ToolAlpaca's list of {"Action", "Action_Input"}."""
    names, arguments = collections.Counter(), {}
    if not gold.lstrip().startswith("["):
        names, arguments = _calls(gold)
    else:
        for call in _DECODER.decode(gold):
            if not isinstance(call, dict) or not isinstance(call.get("Action"), str):
                raise ValueError("a call of the list has no Action")
            names[call["Action"]] += 1
            given = call.get("Action_Input")
            arguments |= _canonical(_DECODER.decode(given) if isinstance(given, str) else given)
    if not names:
        # Otherwise a completion without any call would equal it, with two empty dictionaries.
        raise ValueError("it has no Action")
    return names, arguments


def _tool_call(wanted: _Calls, text: str) -> Verdict:
    """The same functions equally often, and equal arguments of all calls together."""
    try:
        names, arguments = _calls(_visible(text))
    except ValueError as error:
        reason = str(error)
        return _lost("malformed", f"{reason[0].upper()}{reason[1:]}.")
    if not names:
        return _lost("no_answer", "There is no `Action:` with a function.")
    named = ", ".join(sorted(names.elements()))
    given = "{" + ", ".join(f"{_json(k)}: {v}" for k, v in sorted(arguments.items())) + "}"
    given = given.encode("utf-8", "backslashreplace").decode()  # JSON can spell half a character
    right = (names, arguments) == wanted
    if right:
        feedback = "The calls are right."
    elif names != wanted[0]:
        feedback = f"The functions called ({_brief(named)}) are not the right ones."
    else:
        feedback = f"The functions are right, the arguments {_brief(given)} are wrong."
    return Verdict(float(right), right, f"{named} {given}", "plain", feedback)


# ---- a function named in the config ----------------------------------------------------------

# What a function raises over a text of another form than it expects; such texts are certain to
# come, and one of them must not end a run. Anything else (a missing file, a wrong name, memory)
# is a fault of the function or the machine, and ends it with its traceback.
_OF_TEXT = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError)


def check_golds(kind: str, golds: Mapping[str, str], setting: str) -> None:
    """Refuses gold answers that the kind cannot read, before the first rollout.

    Args:
      golds: by the row's id.
      setting: where the rows come from, such as data.path.

    Raises:
      ValueError: naming the first such row.
    """
    read = REWARDS[kind].read_gold if kind in REWARDS else None
    if read is None:
        return
    for row, gold in golds.items():
        try:
            read(gold)
        except ValueError as error:
            raise ValueError(
                f"reward.kind is {kind!r}: the answer {gold[:80]!r} of row {row!r} of {setting} "
                f"cannot be read: {error}"
            ) from error


# What the import of a user's module can raise.
OF_IMPORT = (
    ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError,
    ArithmeticError, RuntimeError, OSError,
)  # fmt: skip


def _resolve(kind: str) -> Callable:
    """The function of "module:function"."""
    module_name, _, name = kind.partition(":")
    try:
        if not name:  # a misspelt kind: not to be imported
            raise ValueError("it is none of these")
        function: Any = getattr(importlib.import_module(module_name), name)
        inspect.signature(function).bind("gold", "text")
    except OF_IMPORT as error:
        raise ValueError(
            f"reward.kind is {kind!r}: the choices are {', '.join(REWARDS)}, or module:function of "
            f"an importable function of (gold, text); {error}"
        ) from error
    return function


def _computed(kind: str, function: Callable, gold: str, text: str) -> Verdict:
    try:
        result = function(gold, text)
    except _OF_TEXT as error:
        return Verdict(0.0, None, None, f"raised:{type(error).__name__}", "")
    pair: Any = result if isinstance(result, tuple) else (result, "")
    typed = len(pair) == 2 and isinstance(pair[0], numbers.Real) and isinstance(pair[1], str)
    if not typed or not math.isfinite(pair[0]):
        raise TypeError(
            f"reward.kind is {kind!r}: it returned {result!r}, neither a finite number nor "
            "(number, text)"
        )
    return Verdict(float(pair[0]), None, None, "computed", pair[1])


class Reward(NamedTuple):
    """An entry of the table of rewards.

    Attributes:
      score: a verdict for each gold answer and text.
      read_gold: raises ValueError for a gold answer that cannot be read; None: all can be.
      forms: the choices of prompt.answer whose answers it finds; () for all of them.
      settings: the settings that this reward reads and others do not, such as eval.extract.
    """

    score: Callable[[Rewarder, Sequence[str], Sequence[str]], list[Verdict]]
    read_gold: Callable[[str], object] | None = None
    forms: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()


REWARDS: dict[str, Reward] = {
    "answer": Reward(_answers, forms=("boxed", "answer_is"), settings=("eval.extract",)),
    "choice": Reward(
        functools.partial(_each, _letter, _choice), read_gold=_letter, forms=("choice", "none")
    ),
    "tool_call": Reward(
        functools.partial(_each, _gold_calls, _tool_call), read_gold=_gold_calls, forms=("none",)
    ),
}
