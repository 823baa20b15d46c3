"""Requests replies in fixed formats from authors, and reads the replies strictly.

Each author's text is read as a `Reply`, which has one of the `STATUSES`. A text that is not in the
requested format is unusable: nothing is guessed from the text.

The reflections are from ROSD (arXiv 2605.28014). The four cases of a critique are from the
step-aligned critique (arXiv 2606.11173). The wording of the requests differs from the wording in
both papers.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from copsd_jax.problems import problem_row, record_files
from copsd_jax.teaching import answer_leaks, step_checker


class Status(NamedTuple):
    """An entry of `STATUSES`."""

    usable: bool  # whether the reply is shown to the teacher
    meaning: str


STATUSES = {
    "ok": Status(True, "in the requested form"),
    "no_quote": Status(True, "a diagnosis that explains the error, but does not quote it"),
    "empty": Status(False, "no text after the thinking, or an empty explanation"),
    "unclosed": Status(False, "the thinking or a tag is never closed, or a tag is never opened"),
    "repeated_tag": Status(False, "a tag occurs more than once"),
    "misplaced_tag": Status(False, "a tag is inside another, out of order, or not in this format"),
    "no_explanation": Status(False, "no explanation"),
    "no_case": Status(False, "the case is missing, or not one of the four"),
    "no_step": Status(False, "the first wrong step is missing, superfluous or not in the attempt"),
    "bad_steps": Status(False, "no steps, or steps that are empty, unclosed or wrongly numbered"),
    "no_answer": Status(False, "no final answer"),
    "prefix_changed": Status(False, "the reply changes the right steps of the attempt"),
    "quotes_error": Status(False, "the wrong step is quoted"),
    "thought": Status(True, "an analysis whose thinking never ends, so the thinking is shown"),
    "leak_dropped": Status(False, "the explanation states the final answer, and context.leak=drop"),
    # The statuses below mean that there is no complete reply.
    "none": Status(False, "the context has no author"),
    "filtered": Status(False, "the completion is not distilled"),
    "not_asked": Status(False, "the attempt failed, and no sibling succeeded"),
    "overlong": Status(False, "the author's prompt and reply need too many positions"),
    "missing": Status(False, "author.path has no record for this completion"),
    "cut": Status(False, "the reply was cut off at author.max_tokens"),
    "nonfinite": Status(False, "the author's logits were not finite"),
    "failed": Status(False, "the server of sampler.url gave no usable text"),
    **{
        name: Status(False, f"failure of the server: {name}")
        for name in ("timeout", "refused", "server_error", "bad_reply", "unreachable")
    },
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """The student's answer to a problem, together with the grading of the answer.

    Attributes:
      row: the problem.
      text: the completion without its thinking.
      correct: whether the answer is right; None if the reward cannot tell.
      feedback: the grader's feedback text.
      sibling: a successful completion of the same group, without its thinking; "" if there is none.
      other: another problem from the data (for the context `other_problem`), or None.
    """

    row: problem_row.Row
    text: str = ""
    correct: bool | None = None
    feedback: str = ""
    sibling: str = ""
    other: problem_row.Row | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """The result of reading an author's text.

    Attributes:
      status: a key of `STATUSES`.
      text: the explanation that the teacher is shown.
      quote: the quoted error, or "".
      step: the number of the attempt's first wrong step, counted from 1, or None.
      case: for a critique, a key of `step_checker.CASES`; "" if there is no case.
      trace: for a critique, the corrected steps and the answer, in tags; "" if there is no trace.
      raw: the author's whole text.
      leaked: whether the explanation states the final answer.
      cut: whether the text was cut off at author.max_tokens, whatever the status is.
      detail: one readable line about a failure, or "".
      shortened: the kinds of the truncated sections in the author's prompt.
    """

    status: str
    text: str = ""
    quote: str = ""
    step: int | None = None
    case: str = ""
    trace: str = ""
    raw: str = ""
    leaked: bool = False
    cut: bool = False
    detail: str = ""
    shortened: tuple[str, ...] = ()


NONE = Reply("none")
FILTERED = Reply("filtered")
PROBE = Reply("ok", text="-", trace="-")  # the shortest reply, to measure the lengths of prompts


DIAGNOSE = """\
The attempt does not reach the right answer. Find the first place where it goes wrong, and reply \
in exactly this form, each tag once and nothing outside the tags:
<error_quote>the shortest piece of the attempt that holds this first error, copied character for \
character</error_quote>
<explanation>what is wrong there, why, and how the step has to be done instead</explanation>"""
EXPLAIN = """\
The attempt reaches the right answer. Reply in exactly this form, the tag once and nothing outside \
it:
<explanation>why the steps are valid, and why they lead to the answer</explanation>"""
CRITIQUE = """\
Correct the attempt step by step. Reply with tags only, one after the other, each once:
1. <case>C</case>, where C is one word:
right: all steps and the answer are right; repeat them unchanged.
thin: the answer is right, but a step that justifies it is missing; repeat the steps and insert it.
unfinished: the attempt stops before an answer; shorten what is there and finish it.
wrong: a step or the answer is wrong; copy the right steps before the first wrong one word for \
word, replace that step by a right one and go on from there. Never quote or mention what was wrong.
2. Only if C is wrong: <first_wrong>K</first_wrong>, where K is the number of the first wrong step \
of the attempt, or one more than the number of its steps if only the final answer is wrong.
3. The corrected steps in the attempt's notation, numbered from 1 without gaps: \
<step_1>...</step_1> <step_2>...</step_2> and so on.
4. <answer>the final answer alone</answer>"""


_REFLECTION = "error_quote|explanation"
_CRITIQUE = "case|first_wrong|step_[0-9]+|answer"


def join_tags(fields: Iterable[tuple[str, str]]) -> str:
    """Joins (tag, content) pairs as tagged text, one pair per line."""
    return "\n".join(f"<{name}>{text}</{name}>" for name, text in fields)


def _read_reply_tags(text: str, names: str) -> tuple[list[tuple[str, str]], str, str]:
    """Reads the tags that follow the thinking, in order; text outside the tags is ignored.

    If the prompt opened a think block, the caller must put `<think>` in front of the text;
    `extraction.extract_answer` has the same rule.

    Returns:
      The (tag, content) pairs, the status of the first error, and the tag of the first error. If
      there is no error, the status and the tag are "".
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text or not text.strip():
        return [], "unclosed" if "<think>" in text else "empty", ""
    found: list[tuple[str, str]] = []
    opened, start = "", 0
    for match in re.finditer(rf"<(/?)({names})>", text):
        closing, name = match.groups()
        if closing and name == opened:
            found.append((name, text[start : match.start()].strip()))
            opened = ""
        elif name == opened or name in dict(found):
            return found, "repeated_tag", name
        elif opened and f"</{opened}>" not in text[match.end() :]:
            return found, "unclosed", opened
        elif opened:
            return found, "misplaced_tag", name
        elif closing:
            return found, "unclosed", name
        else:
            opened, start = name, match.end()
    return found, "unclosed" if opened else "", opened


def read_reflection(text: str, correct: bool) -> Reply:
    """Reads a reflection on an attempt.

    Args:
      text: the reply of an author.
      correct: whether the attempt is correct. A reply about a correct attempt answers the request
        EXPLAIN. A reply about any other attempt answers the request DIAGNOSE.
    """
    found, problem, _ = _read_reply_tags(text, _REFLECTION)
    fields = dict(found)
    swapped = [name for name, _ in found] == ["explanation", "error_quote"]
    if not problem and (swapped or (correct and "error_quote" in fields)):
        problem = "misplaced_tag"
    if not problem and not fields.get("explanation"):
        problem = "empty" if "explanation" in fields else "no_explanation"
    if problem:
        return Reply(problem, raw=text)
    quote = fields.get("error_quote", "")
    status = "ok" if correct or quote else "no_quote"
    return Reply(status, fields["explanation"], quote, raw=text)


def read_published_reflection(text: str, correct: bool) -> Reply:
    """Reads a reply to EXPLAIN or DIAGNOSE as ROSD's code does (parity.reflection_tags).

    Tags are matched regardless of case, and the content of a tag ends at the first closing tag.
    Tags inside the thinking are read, too. The function looks for the misspelt tag `explaination`
    first, then for `explanation`, then for `reflection`. The explanation is the content of the
    first tag that the function finds, even if the content is empty. The quote does not depend on
    the explanation, so a reply with the status no_explanation may have a quote.
    """

    def first(name: str) -> str | None:
        match = re.search(rf"<{name}>(.*?)</{name}>", text, re.IGNORECASE | re.DOTALL)
        return match[1].strip() if match else None

    names = ("explaination", "explanation", "reflection")
    said = next((found for name in names if (found := first(name)) is not None), "")
    quote = "" if correct else first("error_quote") or ""
    status = "no_explanation" if not said else "ok" if correct or quote else "no_quote"
    return Reply(status, said, quote, raw=text)


def read_analysis(text: str) -> Reply:
    """Reads the analysis for the context reason_first: the whole text after the thinking.

    If the thinking never ends, it is used as the analysis (status "thought"), because an analysis
    needs no tags. An empty analysis has the status "empty".
    """
    _, closed, after = text.rpartition("</think>")
    said = after.strip() if closed else text.replace("<think>", "").strip()
    if not said:
        return Reply("empty", raw=text)
    return Reply("thought" if "<think>" in text and not closed else "ok", said, raw=text)


def read_critique(text: str) -> Reply:
    """Reads a reply to CRITIQUE; `trace` keeps only the tagged steps and the tagged answer."""
    found, problem, name = _read_reply_tags(text, _CRITIQUE)
    if problem:
        return Reply("bad_steps" if name.startswith("step_") else problem, raw=text)
    fields = dict(found)
    names = [name for name, _ in found if name.startswith("step_")]
    case, step = fields.get("case", ""), fields.get("first_wrong")
    numbered = [f"step_{k}" for k in range(1, len(names) + 1)]
    number = int(step) if step and re.fullmatch("[1-9][0-9]{0,5}", step) else None
    order = ["case", *(["first_wrong"] if step is not None else ()), *names, "answer"]
    if case not in step_checker.CASES:
        problem = "no_case"
    elif (case == "wrong") != (step is not None) or (step is not None and number is None):
        problem = "no_step"
    elif not names or not all(map(fields.get, names)) or names != numbered:
        problem = "bad_steps"
    elif not fields.get("answer"):
        problem = "no_answer"
    elif [name for name, _ in found] != order:
        problem = "misplaced_tag"
    elif number is not None and number > len(names) + 1:
        problem = "no_step"
    if problem:
        return Reply(problem, raw=text)
    trace = join_tags(found[-len(names) - 1 :])
    return Reply("ok", step=number, case=case, trace=trace, raw=text)


def verify_critique(reply: Reply, attempt_steps: Sequence[str]) -> Reply:
    """Returns a critique, with an error status if the attempt shows that the critique is unusable.

    The attempt's steps before the first wrong step must occur in the trace, in the same order.
    Where the trace repeats a right step, only the white space may differ. If the attempt is wrong,
    other steps may be inserted between the right steps. In the trace, the whole wrong step
    may occur only inside a repeated right step; parts of the wrong step may occur anywhere. A model
    copies errors that it is shown, so the student would learn a wrong step that the trace contains.
    A critique whose case is neither "right" nor "wrong" is returned unchanged.

    Args:
      reply: a critique, from `read_critique`.
      attempt_steps: the texts of the attempt's steps, with or without their tags.
    """
    if reply.status != "ok" or reply.case not in ("right", "wrong"):
        return reply
    own = [_bare(step) for step in attempt_steps]
    *given, answer = [_bare(text) for _, text in _read_reply_tags(reply.trace, _CRITIQUE)[0]]
    k = reply.step or len(own) + 1
    right, wrong = own[: k - 1], "".join(own[k - 1 : k]).rstrip(" .,;:!?")
    rest = [step for step in given if step not in right]
    status = "ok"
    if k > len(own) + 1:
        status = "no_step"
    elif find_end(given, right) is None or (reply.case == "right" and given != own):
        status = "prefix_changed"
    elif wrong and any(next(answer_leaks.find_words(s, wrong), None) for s in (*rest, answer)):
        status = "quotes_error"
    return dataclasses.replace(reply, status=status)


def find_end(given: Sequence[str], right: Sequence[str]) -> int | None:
    """Finds `right` in `given`, in order; returns the index after the last step, or None."""
    at = 0
    for step in right:
        if step not in given[at:]:
            return None
        at = given.index(step, at) + 1
    return at


def _bare(step: str) -> str:
    return " ".join(re.sub(r"</?step_[0-9]+>", " ", step).split())


# --------------------------------------------------------------------------------- reply files


def load_reply_file(path: str, setting: str = "author.path") -> dict[tuple[str, int], str]:
    """Loads replies from a file, as a map from (row id, sample) to the text of the reply.

    A record has the fields `id`, `reply` and `sample`. The field `sample` is optional, with the
    default 0.

    Args:
      path: a file that `record_files.read_records` can read.
      setting: the name of the setting that gives `path`, for error messages.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there are no replies, or a record is invalid; the message names the file and the
        line.
    """
    out: dict[tuple[str, int], str] = {}
    for where, fields in record_files.read_records(path, setting=setting):
        row, sample, fault = fields.get("id"), fields.get("sample", 0), _find_reply_fault(fields)
        if not fault and (row, sample) in out:
            fault = f"id {row!r} with sample {sample} occurs twice"
        if fault:
            raise ValueError(f"{path}, {where}: {fault}")
        out[str(row), sample] = fields["reply"]
    if not out:
        raise ValueError(f"{setting} is {path!r}: it has no replies")
    return out


def _find_reply_fault(fields: dict) -> str:
    """Describes the fault of a record in a reply file; returns "" if the record has no fault."""
    sample = fields.get("sample", 0)
    if unknown := sorted(fields.keys() - {"id", "sample", "reply"}):
        return f"unknown field {unknown[0]!r}: the fields are id, sample, reply"
    if type(sample) is not int or sample < 0:  # isinstance would also accept True
        return f"sample is {sample!r}: it must be a whole number of at least 0"
    for name in ("id", "reply"):
        value = fields.get(name)
        if not isinstance(value, str) or (name == "id" and not value):
            return f"{name} is {value!r}: it must be a text"
        if re.search("[\ud800-\udfff]", value):
            return f"{name} has half of a surrogate pair, which is not valid text"
    return ""


def apply_leak_policy(reply: Reply, row: problem_row.Row, policy: str) -> Reply:
    """Applies context.leak to a reply whose explanation may state the final answer.

    Args:
      reply: the reply; it is returned unchanged if the explanation does not state the answer.
      row: the problem; if the problem has no answer, the reply is returned unchanged.
      policy: `keep` marks the reply as leaked. `mask` marks the reply as leaked, and masks the
        answer in the explanation. `drop` makes the reply unusable, with the status "leak_dropped".
    """
    if not reply.text or not row.answer or not answer_leaks.has_leak(reply.text, row.answer):
        return reply
    if policy == "drop":
        return Reply("leak_dropped", quote=reply.quote, raw=reply.raw)
    text = answer_leaks.mask_leak(reply.text, row.answer) if policy == "mask" else reply.text
    return dataclasses.replace(reply, text=text, leaked=True)
