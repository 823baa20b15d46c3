"""A rule that finds the first wrong step of an attempt, and corrects the attempt.

For problems that are solved by equations, the rule can write critiques and reflections in place of
a model. The rule compares an attempt's equations with the equations of the reference solution.
The four `CASES` come from critique-conditioned self-distillation (arXiv 2606.11173).
"""

import bisect
import re
from collections.abc import Sequence
from typing import NamedTuple

from copsd_jax.rewards import comparison
from copsd_jax.teaching import equations, solution_steps

CASES = {
    "right": "the right answer, and every needed step",
    "thin": "the right answer, but a needed step is missing",
    "unfinished": "no wrong step, but the answer is missing",
    "wrong": "a step or the answer is wrong",
}


class StepVerdict(NamedTuple):
    """The verdict of `check_attempt`.

    Attributes:
      case: a key of `CASES`.
      wrong_step: the number of the earliest wrong step, counted from 1; None if no step is wrong.
      wrong: the characters [start, end) of the wrong equation, or of the step that states a wrong
        answer; None if no step is wrong.
      kept: the attempt's steps before the wrong step, except steps that state an answer.
      corrected: the steps of the corrected trace, without the final answer.
    """

    case: str
    wrong_step: int | None
    wrong: tuple[int, int] | None
    kept: tuple[str, ...]
    corrected: tuple[str, ...]


def check_attempt(
    text: str, solution: str, gold: str, found: str | None, correct: bool
) -> StepVerdict:
    """Finds the earliest wrong step of an attempt, and corrects the attempt from that step on.

    The needed results are the values of the solution's equations. Each equation of the attempt
    reaches the first needed result that has the same value and is not yet reached. It does not
    matter which operations an equation uses. An equation also reaches earlier needed results that
    it computes on the way: "3 * 5 - 4 = 11" can reach 15 and 11.

    A step is wrong if it has a false equation. In an attempt whose answer is wrong or missing, a
    step is also wrong if one of its equations has a value that is not a needed result. If the
    answer is right, the checker accepts every true equation, because there may be another way to
    the answer. If the answer is wrong but no equation is wrong, the step that states the answer is
    the wrong step.

    The corrected trace copies verbatim the attempt's steps before the wrong step, except steps that
    state an answer. Missing equations of the solution are inserted before the step that needs them,
    or at the end. Inserted equations are written with the signs and spacing of the attempt. From an
    unfinished attempt, the trace keeps only the equations that reach a result.

    Args:
      text: the attempt.
      solution: the reference solution.
      gold: the reference answer.
      found: the attempt's answer; None if the attempt has no answer.
      correct: whether `found` equals `gold`.

    Raises:
      ValueError: `can_check` refuses the solution, or `found` and `correct` contradict the text.
    """
    fault = _find_solution_fault(solution, gold)
    if fault:
        raise ValueError(f"the rule cannot check the solution {solution!r}: {fault}")
    attempt, needed = solution_steps.split_steps(text), equations.find_equations(solution)
    if (found is None and correct) or (found is not None and not attempt):
        raise ValueError(f"found={found!r}, correct={correct}: not possible for the text {text!r}")
    reached = _match_results(equations.find_equations(text), needed)
    wrong, span = _find_earliest_error(attempt, reached, found is not None, correct)
    missing = len({i for _, new in reached for i in new or ()}) < len(needed)
    case = "wrong" if wrong else "unfinished" if found is None else "thin" if missing else "right"
    kept = [s for s in attempt if not s.final and (not wrong or s.number < wrong.number)]
    spelt = [_respell(solution[e.start : e.end], text, [m for m, _ in reached]) for e in needed]
    corrected = _correct_steps(text, kept, reached, spelt, condense=case == "unfinished")
    texts = tuple(step.text for step in kept)
    return StepVerdict(case, wrong.number if wrong else None, span, texts, corrected)


def can_check(solution: str, gold: str | None = None) -> bool:
    """Tells whether a solution has equations that are all true and end in the value `gold`."""
    return _find_solution_fault(solution, gold) is None


def _find_solution_fault(solution: str, gold: str | None) -> str | None:
    needed = equations.find_equations(solution)
    if not needed:
        return "it has no equation"
    for equation in needed:
        if not equation.true:
            return f"{solution[equation.start : equation.end]!r} is false"
    if gold is not None and comparison.compare_plainly(gold, str(needed[-1].value)) is not True:
        return f"it ends in {needed[-1].value}, but the answer is {gold!r}"
    return None


_Equations = Sequence[equations.Equation]
_Steps = Sequence[solution_steps.Step]
_Reached = list[tuple[equations.Equation, set[int] | None]]


def _match_results(attempt: _Equations, needed: _Equations) -> _Reached:
    """Returns each equation of the attempt with the indices of the results that it newly reaches.

    The set of indices is empty if earlier equations already reached the results. An equation whose
    value is not a needed result has None instead of a set of indices.
    """
    out: _Reached = []
    done: set[int] = set()
    for equation in attempt:
        same = [i for i, it in enumerate(needed) if it.value == equation.value]
        new = {i for i in same if i not in done}
        if new:
            first = min(new)
            on_the_way = (i for i in range(first) if needed[i].value in equation.results)
            new = {first, *on_the_way} - done
        done |= new
        out.append((equation, new if same else None))
    return out


def _find_earliest_error(
    attempt: _Steps, reached: _Reached, answered: bool, correct: bool
) -> tuple[solution_steps.Step | None, tuple[int, int] | None]:
    """Returns the earliest wrong step and its error's span; (None, None) if no step is wrong."""
    for equation, new in reached:
        if not equation.true or (new is None and not correct):
            holds = next(s for s in attempt if s.start <= equation.start < s.end)
            return holds, (equation.start, equation.end)
    if correct or not answered:
        return None, None
    last = ([s for s in attempt if s.final] or attempt)[-1]
    return last, (last.start, last.end)


def _correct_steps(
    text: str, kept: _Steps, reached: _Reached, spelt: Sequence[str], condense: bool
) -> tuple[str, ...]:
    """Returns the kept steps, with missing equations of the solution (from `spelt`) inserted.

    If `condense` is set, each kept step is reduced to its equations that reach a result.
    """
    lines: list[str] = []
    done: set[int] = set()
    starts = [equation.start for equation, _ in reached]
    for step in kept:
        own = slice(*(bisect.bisect_left(starts, place) for place in (step.start, step.end)))
        inside = [(equation, new) for equation, new in reached[own] if new]
        new = {i for _, results in inside for i in results or ()}
        lines += [spelt[i] for i in range(max(new, default=0)) if i not in done | new]
        done |= set(range(max(new, default=-1) + 1)) | new
        lines += [f"{text[e.start : e.end]}." for e, _ in inside] if condense else [step.text]
    return (*lines, *(line for i, line in enumerate(spelt) if i not in done))


def _respell(equation: str, text: str, models: _Equations) -> str:
    """Writes an equation of the solution as a step, with the signs and spacing of the attempt."""
    signs: dict[str, str] = {}
    for model in models:
        for token in equations.TOKEN.finditer(text, model.start, model.end):
            if token["sign"]:
                signs.setdefault(equations.SIGNS.get(token[0], "*"), token[0])
    written = [
        signs.get(equations.SIGNS.get(token[0], "*"), token[0]) if token["sign"] else token[0]
        for token in equations.TOKEN.finditer(equation)
    ]
    if models and not re.search(r"\s", text[models[0].start : models[0].end]):
        written = [part for part in written if not part.isspace()]
    return "".join(written) + "."
