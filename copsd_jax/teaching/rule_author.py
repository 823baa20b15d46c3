"""Replies written by a rule that knows the steps of a problem (author.kind=grader).

The rule turns the verdict of `step_checker.check_attempt` into a reply in the format of
`replies.DIAGNOSE`, `EXPLAIN` or `CRITIQUE`. The rule's replies are read like the replies of any
other author.
"""

from copsd_jax.problems import problem_row
from copsd_jax.teaching import replies, step_checker
from copsd_jax.teaching.replies import Attempt


def _check_attempt_by_rule(attempt: Attempt, found: str | None) -> step_checker.StepVerdict:
    row, correct = attempt.row, bool(attempt.correct)
    return step_checker.check_attempt(attempt.text, row.solution, row.answer, found, correct)


def write_reflection(attempt: Attempt, found: str | None) -> str:
    """Writes a reflection on an attempt, in the format of DIAGNOSE or EXPLAIN.

    The quoted text is exactly the error. If the attempt merely lacks a step or the answer, nothing
    is quoted. A right attempt is explained even if some of its steps have faults, because EXPLAIN
    requests an explanation.

    Args:
      attempt: the attempt; the rule must be able to check the problem's solution.
      found: the answer that the grader found in the attempt, or None.
    """
    verdict, quote = _check_attempt_by_rule(attempt, found), ""
    if attempt.correct:
        said = f"Each step is valid, and the last one gives the answer: {attempt.row.solution}"
    elif verdict.wrong is None:
        said = f"A step is missing. The whole solution is: {' '.join(verdict.corrected)}"
    else:
        quote = f"<error_quote>{attempt.text[slice(*verdict.wrong)]}</error_quote>\n"
        rest = verdict.corrected[replies.find_end(verdict.corrected, verdict.kept) or 0 :]
        said = (
            f"The step should be {rest[0]}"
            if rest
            else f"The last step is: {verdict.corrected[-1]}"
        )
    return f"{quote}<explanation>{said}</explanation>"


def write_critique(attempt: Attempt, found: str | None) -> str:
    """Writes a critique of an attempt, in the format of CRITIQUE.

    Args:
      attempt: the attempt; the rule must be able to check the problem's solution.
      found: the answer that the grader found in the attempt, or None.
    """
    verdict = _check_attempt_by_rule(attempt, found)
    # In a critique, steps that state the answer are not counted.
    first = [("first_wrong", str(len(verdict.kept) + 1))] if verdict.case == "wrong" else []
    steps = [(f"step_{k}", step) for k, step in enumerate(verdict.corrected, 1)]
    answer = ("answer", attempt.row.answer)
    return replies.join_tags([("case", verdict.case), *first, *steps, answer])


def write_exemplar_reflection(attempt: Attempt) -> replies.Reply:
    """Returns the reflection shown for an exemplar; the attempt is the exemplar's own solution.

    The reflection is the whole solution after the words "The step should be". The rule also begins
    the correction of a wrong step with these words, so exemplars and problems have prompts of the
    same form.

    Raises:
      ValueError: the rule cannot check the row's solution.
    """
    _check_exemplar(attempt.row)
    return replies.Reply("ok", f"The step should be {attempt.row.solution}")


def write_exemplar_critique(attempt: Attempt) -> replies.Reply:
    """Returns the critique shown for an exemplar; the exemplar's attempt is right.

    Raises:
      ValueError: the rule cannot check the row's solution.
    """
    _check_exemplar(attempt.row)
    return replies.read_critique(write_critique(attempt, attempt.row.answer))


def _check_exemplar(row: problem_row.Row) -> None:
    if not step_checker.can_check(row.solution, row.answer):
        raise ValueError(
            f"prompt.exemplars: this context.kind needs exemplars with equations as solutions, but "
            f"the solution of {row.id!r} is {row.solution!r}"
        )
