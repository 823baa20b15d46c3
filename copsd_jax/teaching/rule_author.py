"""Replies written by a rule that knows the steps of a problem (author.kind=grader).

The rule writes the formats of `replies.DIAGNOSE`, `EXPLAIN` and `CRITIQUE` from the verdict of
`step_checker.check_attempt`. Its texts are read as those of any other author.
"""

import dataclasses

from copsd_jax.problems import problem_row
from copsd_jax.teaching import replies, solution_steps, step_checker


def write_reflection(row: problem_row.Row, text: str, found: str | None, correct: bool) -> str:
    """Writes a reflection on an attempt, in the format of DIAGNOSE or EXPLAIN.

    The quote is exactly the error. If a step or the answer is missing there is no quote.

    Args:
      row: a problem whose solution the rule can check.
      text: the attempt.
      found: the attempt's answer, or None.
      correct: whether that answer is right. If so, the attempt is explained whatever its steps
        are, as every author is asked to.
    """
    verdict = step_checker.check_attempt(text, row.solution, row.answer, found, correct)
    quote, corrected = "", list(verdict.corrected)
    if correct:
        said = f"Each step is valid, and the last one gives the answer: {row.solution}"
    elif verdict.wrong is None or verdict.wrong_step is None:
        said = f"A step is missing. The whole solution is: {' '.join(corrected)}"
    else:
        quote = f"<error_quote>{text[slice(*verdict.wrong)]}</error_quote>\n"
        before = solution_steps.split_steps(text)[: verdict.wrong_step - 1]
        kept = [text[step.start : step.end] for step in before if not step.final]
        rest = corrected[replies.find_end(corrected, kept) or 0 :]
        said = f"The step should be {rest[0]}" if rest else f"The last step is: {corrected[-1]}"
    return f"{quote}<explanation>{said}</explanation>"


def write_critique(row: problem_row.Row, text: str, found: str | None, correct: bool) -> str:
    """Writes a critique of an attempt, in the format of CRITIQUE.

    Args:
      row: a problem whose solution the rule can check.
      text: the attempt.
      found: the attempt's answer, or None.
      correct: whether that answer is right.
    """
    verdict = step_checker.check_attempt(text, row.solution, row.answer, found, correct)
    if verdict.wrong_step:
        # A critic counts steps without those that state the answer.
        before = solution_steps.split_steps(text)[: verdict.wrong_step - 1]
        number = 1 + sum(not step.final for step in before)
        verdict = dataclasses.replace(verdict, wrong_step=number)
    return _format_critique(verdict, row.answer)


def _format_critique(verdict: step_checker.StepVerdict, answer: str) -> str:
    first = [("first_wrong", str(verdict.wrong_step))] if verdict.case == "wrong" else []
    names = replies.name_steps(len(verdict.corrected))
    steps = zip(names, verdict.corrected, strict=True)
    tags = [("case", verdict.case), *first, *steps, ("answer", answer)]
    return "\n".join(f"<{name}>{text}</{name}>" for name, text in tags)


def write_exemplar_reflection(row: problem_row.Row) -> replies.Reply:
    """Returns the reflection that stands for an exemplar, whose attempt is its own solution.

    It shows the whole solution in the words that point out a missed step, so that exemplars and
    problems have one form.

    Raises:
      ValueError: the rule cannot check the row's solution.
    """
    _check_exemplar(row)
    return replies.Reply("ok", f"The step should be {row.solution}")


def write_exemplar_critique(row: problem_row.Row, text: str) -> replies.Reply:
    """Returns the critique that stands for an exemplar, whose attempt `text` is right.

    Raises:
      ValueError: the rule cannot check the row's solution.
    """
    _check_exemplar(row)
    verdict = step_checker.check_attempt(text, row.solution, row.answer, row.answer, True)
    return replies.read_critique(_format_critique(verdict, row.answer))


def _check_exemplar(row: problem_row.Row) -> None:
    if not step_checker.can_check(row.solution, row.answer):
        raise ValueError(
            f"prompt.exemplars of this context.kind need solutions that are equations, that of "
            f"{row.id!r} is {row.solution!r}"
        )
