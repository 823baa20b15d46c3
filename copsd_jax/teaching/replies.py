"""What a writer is asked to write about an attempt, and what is read from its text.

Formats are requested in one place, here, and read strictly: every text gives a `Reply` with a
status of STATUSES, and no half-read text is guessed at. `rule_reflection` and `rule_critique` write
the same formats from a rule that knows the steps (`solution_steps.check`), so they go the same way.

ROSD (arXiv 2605.28014, ALGORITHMS.md 2.2) is the source of the reflections, the step-aligned
critique (arXiv 2606.11173, ALGORITHMS.md 1.5) of the four cases; all wordings are our own.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from copsd_jax.problems import sources
from copsd_jax.rewards import graders
from copsd_jax.teaching import solution_steps

KINDS = ("diagnose", "explain")


class Status(NamedTuple):
    usable: bool  # whether the teacher is shown what was read
    meaning: str


STATUSES = {
    "ok": Status(True, "as asked for"),
    "no_quote": Status(True, "a diagnosis that explains, and quotes no error"),
    "empty": Status(False, "nothing behind the thinking, or nothing in the explanation"),
    "unclosed": Status(False, "the thinking or a tag never ends, or ends without a beginning"),
    "repeated_tag": Status(False, "a tag more than once"),
    "misplaced_tag": Status(False, "a tag inside another, out of order, or not of this format"),
    "no_explanation": Status(False, "no explanation"),
    "no_case": Status(False, "no case, or none of the four"),
    "no_step": Status(False, "the first wrong step is missing, is none, or is one too many"),
    "bad_steps": Status(False, "steps that are none, empty, unclosed or not numbered 1 to n"),
    "no_answer": Status(False, "no final answer"),
    "prefix_changed": Status(False, "the right steps are not those of the attempt"),
    "quotes_error": Status(False, "the wrong step is quoted"),
    "thought": Status(True, "an analysis whose thinking never ends: what was thought is shown"),
    "leak_dropped": Status(False, "the explanation gives the final answer away: context.leak=drop"),
    # Where nothing was written.
    "none": Status(False, "the context has no writer"),
    "filtered": Status(False, "the completion is not to be distilled"),
    "not_asked": Status(False, "there is nothing to ask about: a failure without a success"),
    "overlong": Status(False, "the writer's prompt and reply pass the model's positions"),
    "missing": Status(False, "author.path has no such record"),
    "cut": Status(False, "it ended at author.max_tokens"),
    **{
        name: Status(False, f"of the server: {name}")
        for name in ("timeout", "refused", "server_error", "bad_reply", "unreachable")
    },
}


@dataclasses.dataclass(frozen=True)
class Reply:
    """What was read from a writer's text.

    Attributes:
      status: a key of STATUSES.
      text: the explanation that the teacher is shown.
      quote: the quoted error, or "".
      step: the first wrong step of the attempt, counted from 1, or None.
      case: a key of steps.CASES, of a critique.
      trace: the corrected steps and answer, in tags, of a critique.
      raw: all that was written.
      leaked: whether the explanation gives the final answer away.
    """

    status: str
    text: str = ""
    quote: str = ""
    step: int | None = None
    case: str = ""
    trace: str = ""
    raw: str = ""
    leaked: bool = False  # the explanation gives the final answer away
    cut: bool = False  # it ended at author.max_tokens, whatever was made of it
    detail: str = ""  # of a failure, a line for people
    shortened: tuple[str, ...] = ()  # sections of the writer's prompt that were cut

    @property
    def usable(self) -> bool:
        return STATUSES[self.status].usable


NONE = Reply("none")
FILTERED = Reply("filtered")
PROBE = Reply("ok", text="-", trace="-")  # the shortest of everything, to measure a prompt


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
_NAMES = [f"step_{k}" for k in range(1, 10_000)]


def _said(text: str) -> str | None:
    """What stands behind the thinking; None where it never ends.

    A caller whose prompt opened the block puts `<think>` in front, as for `graders.extract`.
    """
    said = text.rpartition("</think>")[2]
    return None if "<think>" in said else said.strip()


def _scan(text: str, names: str) -> tuple[list[tuple[str, str]], str, str]:
    """Tags in their order with their contents, and the first status and tag that is not in order.

    Text outside the tags is passed over: nobody is shown it.
    """
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


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: the choices are {', '.join(KINDS)}")


def reflection(text: str, kind: str) -> Reply:
    """Reads a reply to DIAGNOSE or EXPLAIN; `kind` is one of KINDS, else ValueError."""
    _check_kind(kind)
    said = _said(text)
    if not said:
        return Reply("unclosed" if said is None else "empty", raw=text)
    found, problem, _ = _scan(said, _REFLECTION)
    fields = dict(found)
    if not problem and kind == "explain" and "error_quote" in fields:
        problem = "misplaced_tag"
    if not problem and not fields.get("explanation"):
        problem = "empty" if "explanation" in fields else "no_explanation"
    if problem:
        return Reply(problem, raw=text)
    quote = fields.get("error_quote", "")
    status = "no_quote" if kind == "diagnose" and not quote else "ok"
    return Reply(status, fields["explanation"], quote, raw=text)


def reflection_as_published(text: str, kind: str) -> Reply:
    """ROSD's reader: any case, the shortest match, a misspelt tag first, thinking not dropped.

    Quote and explanation are independent of one another, so a quote may come with the status
    no_explanation. The first tag name that occurs decides, even if nothing is in it.
    """
    _check_kind(kind)

    def first(name: str) -> str | None:
        match = re.search(rf"<{name}>(.*?)</{name}>", text, re.IGNORECASE | re.DOTALL)
        return match[1].strip() if match else None

    names = ("explaination", "explanation", "reflection")
    said = next((found for name in names if (found := first(name)) is not None), "")
    quote = (first("error_quote") or "") if kind == "diagnose" else ""
    missing = "no_quote" if kind == "diagnose" and not quote else "ok"
    return Reply(missing if said else "no_explanation", said, quote, raw=text)


def analysis(text: str) -> Reply:
    """Reads what a teacher of reason_first wrote: all that stands behind its thinking.

    An analysis whose thinking never ends is what was thought (status "thought"): unlike the other
    formats it has no form that could be missed. An empty one has no text (status "empty").
    """
    _, closed, after = text.rpartition("</think>")
    said = after.strip() if closed else text.replace("<think>", "").strip()
    if not said:
        return Reply("empty", raw=text)
    return Reply("thought" if "<think>" in text and not closed else "ok", said, raw=text)


def critique(text: str) -> Reply:
    """Reads a reply to CRITIQUE; `trace` is its steps and answer, without what stands between."""
    said = _said(text)
    if not said:
        return Reply("unclosed" if said is None else "empty", raw=text)
    found, problem, name = _scan(said, _CRITIQUE)
    if problem:
        return Reply("bad_steps" if name.startswith("step_") else problem, raw=text)
    fields = dict(found)
    names = [name for name, _ in found if name.startswith("step_")]
    case, step = fields.get("case", ""), fields.get("first_wrong")
    number = int(step) if step and re.fullmatch("[1-9][0-9]{0,5}", step) else None
    order = ["case", *(["first_wrong"] if step is not None else ()), *names, "answer"]
    if case not in solution_steps.CASES:
        problem = "no_case"
    elif (case == "wrong") != (step is not None) or (step is not None and number is None):
        problem = "no_step"
    elif not names or not all(map(fields.get, names)) or names != _NAMES[: len(names)]:
        problem = "bad_steps"
    elif not fields.get("answer"):
        problem = "no_answer"
    elif [name for name, _ in found] != order:
        problem = "misplaced_tag"
    elif number is not None and number > len(names) + 1:
        problem = "no_step"
    if problem:
        return Reply(problem, raw=text)
    return Reply("ok", step=number, case=case, trace=_trace(found), raw=text)


def _trace(fields: Sequence[tuple[str, str]]) -> str:
    """Steps and answer in tags, a line each."""
    shown = [(name, text) for name, text in fields if name not in ("case", "first_wrong")]
    return "\n".join(f"<{name}>{text}</{name}>" for name, text in shown)


def verify_critique(reply: Reply, attempt_steps: Sequence[str]) -> Reply:
    """Holds a critique against the attempt; its status changes where it may not be shown.

    The steps before the first wrong one must be in the trace in their order and word for word but
    for white space; missing ones may stand between them, except in a right attempt. The wrong step
    must not occur in the rest: a model copies an error that it is shown (induction), and the copy
    is what the student would be taught. Parts of the wrong step are not looked for.

    Args:
      attempt_steps: the texts of the attempt's steps, with or without their tags.
    """
    if reply.status != "ok" or reply.case not in ("right", "wrong"):
        return reply
    own = [_bare(step) for step in attempt_steps]
    *given, answer = [_bare(text) for _, text in _scan(reply.trace, _CRITIQUE)[0]]
    k = reply.step or len(own) + 1
    right, wrong = own[: k - 1], "".join(own[k - 1 : k]).rstrip(" .,;:!?")
    rest = [step for step in given if step not in right]
    status = "ok"
    if k > len(own) + 1:
        status = "no_step"
    elif _behind(given, right) is None or (reply.case == "right" and given != own):
        status = "prefix_changed"
    elif wrong and any(next(_words(text, wrong), None) for text in (*rest, answer)):
        status = "quotes_error"
    return dataclasses.replace(reply, status=status)


def _behind(given: Sequence[str], right: Sequence[str]) -> int | None:
    """The place in `given` behind all of `right`, found in their order; None if they are not."""
    at = 0
    for step in right:
        if step not in given[at:]:
            return None
        at = given.index(step, at) + 1
    return at


def _bare(step: str) -> str:
    return " ".join(re.sub(r"</?step_[0-9]+>", " ", step).split())


# --------------------------------------------------------------------------------------- leaks

_DIGITS = r"(?:\d+|[\u1369-\u137c]+)"  # of any script; Ge'ez numerals have a run of their own
# A number with separators inside: a blank only where a group of three follows, as in 10 000.
_NUMBER = re.compile(
    rf"{_DIGITS}(?:(?:[.,'’٫٬،．，]|\{{,\}}){_DIGITS}|(?:\\,|[ \u00a0\u202f])\d{{3}}(?!\d))*"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|(?<!\d)\d+\s*[/／⁄]\s*\d+")
_MINUS = "-−‐‑–－﹣"
# Scripts without blanks between words: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)


def leak(text: str, answer: str) -> bool:
    """Whether `text` states the final answer.

    Numbers are compared as numbers, digits of all scripts alike: 13 is in "8 + 5 = 13." and not in
    "130" or "1.13". Another answer must occur as whole words, in any case; a single letter in its
    own case, since "a" is also a word. Numbers spelt out, and formulas written otherwise, are not
    found. An unknown answer ("") is in no text.
    """
    return bool(_leaks(text, answer))


def mask_leak(text: str, answer: str) -> str:
    """`text` with "[...]" in place of each final answer that `leak` sees."""
    out, at = [], 0
    for start, end in _leaks(text, answer):
        if start >= at:
            out += [text[at:start], "[...]"]
        at = max(at, end)
    return "".join(out) + text[at:]


def _leaks(text: str, answer: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each place that states the answer, in their order."""
    if not answer.strip():
        return []
    spans = [match.span() for match in _FRACTION.finditer(text)]
    spans += [(_sign(text, match.start()), match.end()) for match in _NUMBER.finditer(text)]
    found = [s for s in spans if graders.plainly_equal(answer, text[slice(*s)]) is True]
    if _NUMBER.fullmatch(answer.strip().lstrip(_MINUS + "+")) is None:
        found += _words(text, answer)
    return sorted(found)


def _sign(text: str, start: int) -> int:
    """Where a number with its sign starts: at a minus that neither joins words nor subtracts."""
    before = text[max(start - 20, 0) : start].rstrip(" ")
    minus = before[-1:]
    if not minus or minus not in _MINUS or before[-2:-1].isalnum():
        return start
    operand = before[:-1].rstrip()[-1:]
    if operand.isdigit() or operand in tuple(")]}"):
        return start
    return start - len(text[max(start - 20, 0) : start]) + len(before) - 1


def _words(text: str, wanted: str) -> Iterator[tuple[int, int]]:
    """Where `wanted` occurs as whole words, white space, case and Unicode composition aside."""
    wanted = " ".join(wanted.split())
    forms = {unicodedata.normalize(form, wanted) for form in ("NFC", "NFD")} | {wanted}
    pattern = "|".join(r"\s+".join(map(re.escape, form.split())) for form in sorted(forms))
    case = re.NOFLAG if len(wanted) == 1 else re.IGNORECASE
    for match in re.finditer(pattern, text, case):
        start, end = match.span()
        left, right = text[max(start - 2, 0) : start], text[end : end + 2][::-1]
        if not (_goes_on(left, match[0][0]) or _goes_on(right, match[0][-1])):
            yield start, end


def _goes_on(beside: str, edge: str) -> bool:
    """Whether the word or number of `edge` goes on in the text beside it, which ends there."""
    near, further = beside[-1:], beside[-2:-1]
    if edge.isdigit() and near in tuple(".,"):
        return further.isdigit()
    if not near or _UNSPACED.match(edge) or _UNSPACED.match(near):
        return False
    return _wordy(edge) and _wordy(near)


def _wordy(char: str) -> bool:
    return char.isalnum() or char == "_" or unicodedata.category(char)[0] == "M"


def from_file(path: str, setting: str = "author.path") -> dict[tuple[str, int], str]:
    """Texts by row id and sample, of a file with the fields id, sample (or 0) and reply.

    Raises:
      FileNotFoundError, ValueError: in one sentence with file and line.
    """
    out: dict[tuple[str, int], str] = {}
    for where, fields in sources.read(path, setting=setting):
        row, sample, problem = fields.get("id"), fields.get("sample", 0), _problem(fields)
        if not problem and (row, sample) in out:
            problem = f"id {row!r} with sample {sample} occurs twice"
        if problem:
            raise ValueError(f"{path}, {where}: {problem}")
        out[str(row), sample] = fields["reply"]
    if not out:
        raise ValueError(f"{setting} is {path!r}: it holds no replies")
    return out


def _problem(fields: dict) -> str:
    """What is wrong with a record, or ""."""
    sample = fields.get("sample", 0)
    if unknown := sorted(fields.keys() - {"id", "sample", "reply"}):
        return f"unknown field {unknown[0]!r}: the fields are id, sample, reply"
    if type(sample) is not int or sample < 0:  # True is an int too
        return f"sample is {sample!r}: it must be a whole number of at least 0"
    for name in ("id", "reply"):
        value = fields.get(name)
        if not isinstance(value, str) or (name == "id" and not value):
            return f"{name} is {value!r}: it must be a text"
        if re.search("[\ud800-\udfff]", value):
            return f"{name} holds half of a surrogate pair, which is no text"
    return ""


def rule_reflection(text: str, verdict: solution_steps.Verdict, solution: str) -> str:
    """What the rule writes about the attempt `text`, in the form of DIAGNOSE or EXPLAIN.

    `verdict` is `solution_steps.check`'s. The quote is the error exactly; where none is made (a
    step or the answer is missing) there is no quote.
    """
    quote, corrected = "", list(verdict.corrected)
    if verdict.case == "right":
        said = f"Each step is valid, and the last one gives the answer: {solution}"
    elif verdict.wrong is None or verdict.wrong_step is None:
        said = f"A step is missing. The whole solution is: {' '.join(corrected)}"
    else:
        quote = f"<error_quote>{text[slice(*verdict.wrong)]}</error_quote>\n"
        before = solution_steps.split(text).steps[: verdict.wrong_step - 1]
        kept = [text[step.start : step.end] for step in before if not step.final]
        rest = corrected[_behind(corrected, kept) or 0 :]
        said = f"The step should be {rest[0]}" if rest else f"The last step is: {corrected[-1]}"
    return f"{quote}<explanation>{said}</explanation>"


def rule_critique(verdict: solution_steps.Verdict, answer: str) -> str:
    """What the rule writes in the form of CRITIQUE; `verdict` is `solution_steps.check`'s."""
    first = [("first_wrong", str(verdict.wrong_step))] if verdict.case == "wrong" else []
    trace = [*zip(_NAMES, verdict.corrected, strict=False), ("answer", answer)]
    return "\n".join(f"<{n}>{text}</{n}>" for n, text in [("case", verdict.case), *first, *trace])


def example(kind: str, text: str, solution: str, answer: str) -> Reply:
    """The reply that stands for an exemplar, whose attempt is its own right solution.

    A reflection names the whole solution where it would name the step that was missed, so that
    exemplars and problems have one form.
    """
    if kind == "critique":
        verdict = solution_steps.check(text, solution, answer, answer, True)
        return critique(rule_critique(verdict, answer))
    return Reply("ok", f"The step should be {solution}")
