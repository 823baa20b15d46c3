"""Steps of an answer, and a rule that knows the steps of problems solved by equations.

The rule is the author of critiques and reflections where no model can write them. It reads the
equations of an attempt and of the reference solution, finds the earliest wrong step, and gives the
corrected trace, in which that step does not occur: the four cases of critique-conditioned
self-distillation (arXiv 2606.11173). A small parser of our own reads equations; what a model wrote
is never executed.
"""

import bisect
import dataclasses
import fractions
import re
from collections.abc import Sequence

from copsd_jax.rewards import graders

FORMS = ("tags", "sentences")
STATUSES = {
    "untagged": "no step tags: cut into sentences",
    "tagged": "tags number the steps 1 to n in order, and nothing stands between them",
    "cut": "so they do, but the text ends inside the last step",
    "malformed": "step tags, but not so: cut into sentences",
}
CASES = {
    "right": "the right answer, and every needed step",
    "thin": "the right answer, but a needed step is missing",
    "unfinished": "no wrong step, but no answer",
    "wrong": "a step or the answer is wrong",
}


@dataclasses.dataclass(frozen=True)
class Step:
    """Characters [start, end) of a step, without tags and the white space around it."""

    number: int  # from 1
    start: int
    end: int
    final: bool  # it states the answer


@dataclasses.dataclass(frozen=True)
class Steps:
    form: str  # one of FORMS
    status: str  # a key of STATUSES
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Equation:
    """Characters [start, end) of an equation, and what it says."""

    start: int
    end: int
    value: fractions.Fraction | None  # of its last side; None where it divides by zero
    true: bool  # all sides are equal
    results: tuple[fractions.Fraction | None, ...]  # of every operation in it, in order


@dataclasses.dataclass(frozen=True)
class Verdict:
    case: str  # a key of CASES
    wrong_step: int | None  # number of the earliest wrong step
    wrong: tuple[int, int] | None  # characters of its wrong equation, or of the wrong answer's step
    corrected: tuple[str, ...]  # the steps of the corrected trace, without the final answer
    form: str  # of the attempt: one of FORMS
    status: str  # of the attempt: a key of STATUSES


# ---- steps -----------------------------------------------------------------------------------

_TAG = re.compile(r"<(/?)(?:step_([1-9]\d{0,3})|answer)>")
_ANSWER = re.compile(r"\s*<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_FINAL = re.compile(r"\bthe\s+(?:final\s+)?answer\s+is\b|\\boxed(?![A-Za-z])", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"""\n
    | (?<!^\d) (?<!^\d\d) [.!?]+ [)\]}"'”’»*]* (?=\s|$)  # not the "1." of a list
    | [\u3002\uff01\uff1f\u0964\u1362\u06d4\u061f]+ [)\]}"'”’»*]*""",
    re.VERBOSE | re.MULTILINE,
)


def split(text: str) -> Steps:
    r"""The steps of an answer, numbered from 1.

    With tags, a step is what stands in `<step_1>...</step_1>`, and what follows the last of them,
    as a rule `<answer>...</answer>`, is one more and final. Without, or where tags are malformed, a
    step is a sentence between any tags: it ends at a line's end, at a `.`, `!` or `?` before a
    blank ("3.5" stays whole) and at such a stop of another script. A sentence with several
    equations, or with an equation before its answer, is cut in front of each but the first of them.
    A sentence that says "the answer is" or has a `\boxed`, and what stands in `<answer>`, is final.
    """
    tags = list(_TAG.finditer(text))
    status, spans = _tagged(text, [tag for tag in tags if tag[2]])
    form = "tags" if status in ("tagged", "cut") else "sentences"
    if form == "sentences":
        spans = _sentences(text, tags)
    steps: list[Step] = []
    for start, end, final in spans:
        part = text[start:end]
        start, end = start + len(part) - len(part.lstrip()), start + len(part.rstrip())
        if start < end:
            steps.append(Step(len(steps) + 1, start, end, final))
    return Steps(form, status, tuple(steps))


def _tagged(text: str, tags: Sequence[re.Match]) -> tuple[str, list[tuple[int, int, bool]]]:
    """Status, and spans between step tags; the last is what follows them."""
    spans, at = [], 0
    for n, opening in enumerate(tags[::2], 1):
        closing = tags[2 * n - 1] if 2 * n <= len(tags) else None
        if opening[0] != f"<step_{n}>" or text[at : opening.start()].strip():
            return "malformed", []
        if closing is None:
            return "cut", [*spans, (opening.end(), len(text), False)]
        if closing[0] != f"</step_{n}>":
            return "malformed", []
        spans.append((opening.end(), closing.start(), False))
        at = closing.end()
    answer = _ANSWER.match(text, at)
    spans.append((*(answer.span(1) if answer else (at, len(text))), True))
    return "tagged" if tags else "untagged", spans


def _sentences(text: str, tags: Sequence[re.Match]) -> list[tuple[int, int, bool]]:
    marks = [(equation.start, False) for equation in equations(text)]
    marks += [(match.start(), True) for match in _FINAL.finditer(text)]
    marks.sort()
    spans = []
    names = ["", *(tag[0] for tag in tags)]
    starts = [0, *(tag.end() for tag in tags)]
    ends = [*(tag.start() for tag in tags), len(text)]
    for name, at, end in zip(names, starts, ends, strict=True):
        if name == "<answer>":
            spans.append((at, end, True))
            continue
        stops = [match.end() for match in _SENTENCE_END.finditer(text, at, end)]
        for stop in [*stops, end]:
            inside = slice(*(bisect.bisect_left(marks, (place, False)) for place in (at, stop)))
            spans.extend(_pieces(text, at, stop, marks[inside]))
            at = stop
    return spans


def _pieces(
    text: str, start: int, end: int, marks: Sequence[tuple[int, bool]]
) -> list[tuple[int, int, bool]]:
    """One sentence, cut in front of its marks but the first, and not inside its answer."""
    spans = []
    final = bool(marks) and marks[0][1]
    for at, is_answer in marks[1:]:
        if final:
            break
        while text[at - 1] in "([{$\"'“‘«*":
            at -= 1
        spans.append((start, at, False))
        start, final = at, is_answer
    return [*spans, (start, end, final)]


# ---- equations -------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""(?P<bullet> ^[^\S\n]*[-*+•][^\S\n]+ )
    | (?P<number> \d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d) | \d+(?:[.,]\d+)? | \.\d+ | [\u1369-\u137c]+ )
    | (?P<blank> [^\S\n] | \\?[$€£] | \*\* )
    | (?P<sign> [-+*/−–－＋×·⋅＊÷／] | (?<![^\W\d_])[xX] | \\(?:times|cdot|div)(?![A-Za-z]) )
    | (?P<open> \( ) | (?P<close> \) ) | (?P<equal> =+ | ＝ )
    | (?P<other> . )""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_SIGNS = {"＋": "+", "−": "-", "–": "-", "－": "-", "÷": "/", "／": "/", "\\div": "/"}
_SIGNS |= {"+": "+", "-": "-", "/": "/"}  # all others multiply
_NO_START = re.compile(r"[A-Za-z_^.}%!\\\])]")  # x2, 2^3, \frac{1}{2}3: part of something else
_LONGEST = 20  # characters of a number
_MOST, _BRACKET = 64, 8  # operands of a side; what a bracket counts as, so that few are nested
_END = ("end", "", -1, -1)


def equations(text: str) -> list[Equation]:
    r"""The equations between numbers in a text, in order: "2 + 3 * 4 = 14", "3 x 5 = 15 = 10 + 5".

    Numbers are integers and decimals ("1,234.5", "3,5") in the digits of any script; operations
    are `+ - * /` and their other signs (`x × · ÷ − \times \cdot \div`) with the usual precedence,
    brackets and a sign in front of a number. At least one side has an operation; a side that
    follows an operation on something else ("x + 3 + 4 = 9") belongs to no equation. Values are
    exact: "10 / 3 = 3.33" is false.
    """
    found = []
    tokens = [(str(m.lastgroup), m[0], m.start(), m.end()) for m in _TOKEN.finditer(text)]
    tokens = [token for token in tokens if token[0] != "blank"]
    at = 0
    while at < len(tokens):
        equation, behind = _equation(tokens, at) if _may_start(text, tokens, at) else (None, at)
        if equation is not None:
            found.append(equation)
        at = max(behind, at + 1)
    return found


_Token = tuple[str, str, int, int]  # kind, text, start, end


def _may_start(text: str, tokens: Sequence[_Token], at: int) -> bool:
    kind, written, start, _ = tokens[at]
    if kind not in ("number", "open") and _SIGNS.get(written) != "-":
        return False
    if start and _NO_START.match(text[start - 1]):
        return False
    return not at or tokens[at - 1][0] not in ("number", "sign", "close")


def _equation(tokens: Sequence[_Token], at: int) -> tuple[Equation | None, int]:
    """The equation that begins with a token, and the token behind it."""
    reader = _Reader(tokens, at)
    try:
        sides = [reader.side()]
    except _Unreadable:
        return None, at
    while reader.kind() == "equal":
        before, count = reader.at, len(reader.results)
        reader.at += 1
        try:
            sides.append(reader.side())
        except _Unreadable:
            reader.at = before
            del reader.results[count:]
            break
    if len(sides) < 2 or not reader.results:
        return None, reader.at  # no equation begins inside what was read either
    true = sides[0] is not None and len(set(sides)) == 1
    end = tokens[reader.at - 1][3]
    return Equation(tokens[at][2], end, sides[-1], true, tuple(reader.results)), reader.at


class _Unreadable(Exception):
    """No operand stands where one must."""


class _Reader:
    """Reads sums, products and operands from tokens; a sign without an operand behind ends it."""

    def __init__(self, tokens: Sequence[_Token], at: int):
        self.tokens, self.at = tokens, at
        self.results: list[fractions.Fraction | None] = []
        self._left = 0  # operands that the side may yet have

    def kind(self) -> str:
        return (self.tokens[self.at] if self.at < len(self.tokens) else _END)[0]

    def side(self) -> fractions.Fraction | None:
        self._left = _MOST
        return self._row("+-")

    def _row(self, signs: str) -> fractions.Fraction | None:
        """Operands with signs of one precedence between them, from left to right."""
        read = self._operand if signs == "*/" else lambda: self._row("*/")
        value = read()
        while self.kind() == "sign":
            before, written = self.at, self.tokens[self.at][1]
            sign = _SIGNS.get(written, "*")
            if sign not in signs:
                break
            self.at += 1
            count = len(self.results)
            try:
                value = _apply(sign, value, read())
            except _Unreadable:
                self.at = before
                del self.results[count:]
                break
            self.results.append(value)
        return value

    def _operand(self) -> fractions.Fraction | None:
        kind, written, _, end = self.tokens[self.at] if self.at < len(self.tokens) else _END
        self._left -= _BRACKET if kind == "open" else 1
        self.at += 1
        if self._left < 0:
            raise _Unreadable
        if kind == "number" and len(written) <= _LONGEST:
            return _number(written)
        if _SIGNS.get(written) == "-" and self.kind() == "number":
            if self.tokens[self.at][2] != end:
                raise _Unreadable
            value = self._operand()
            return None if value is None else -value
        if kind == "open":
            value = self._row("+-")
            if self.kind() == "close":
                self.at += 1
                return value
        raise _Unreadable


def _number(written: str) -> fractions.Fraction | None:
    digits = graders.fold_digits(written)
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", digits):
        digits = digits.replace(",", "")
    digits = digits.replace(",", ".")
    if not re.fullmatch(r"\d*\.?\d+", digits):  # Ge'ez digits that make no number
        raise _Unreadable
    return fractions.Fraction(digits)


def _apply(
    sign: str, left: fractions.Fraction | None, right: fractions.Fraction | None
) -> fractions.Fraction | None:
    if left is None or right is None or (sign == "/" and right == 0):
        return None
    if sign in "+-":
        return left + right if sign == "+" else left - right
    return left * right if sign == "*" else left / right


# ---- the rule --------------------------------------------------------------------------------


def covers(solution: str, gold: str | None = None) -> bool:
    """Whether the rule knows a solution: true equations, the last of which gives `gold`."""
    return _fault(solution, gold) is None


def _fault(solution: str, gold: str | None) -> str | None:
    needed = equations(solution)
    if not needed:
        return "it has no equation"
    for equation in needed:
        if not equation.true:
            return f"{solution[equation.start : equation.end]!r} is false"
    if gold is not None and graders.plainly_equal(gold, str(needed[-1].value)) is not True:
        return f"it ends in {needed[-1].value}, and the answer is {gold!r}"
    return None


def check(text: str, solution: str, gold: str, found: str | None, correct: bool) -> Verdict:
    """What is wrong with an attempt, and how it goes on rightly.

    The needed results are those of the solution's equations. An equation of the attempt reaches the
    first result not reached yet that has its value, however computed, and earlier ones that it
    computes on the way ("3 * 5 - 4 = 11"). The earliest wrong step has a false equation, or, in an
    attempt whose answer is not right, an equation whose value no result has; else, with a wrong
    answer, it is the step that states the answer. Beside a right answer a true equation may be
    superfluous: there are other ways.

    The corrected trace has the attempt's steps up to the wrong one, verbatim, and the solution's
    equations in the attempt's signs and spacing where a result has not been reached before the next
    step, and at the end. Steps that state an answer are left out. Of an unfinished attempt only
    the equations that reach a result are kept.

    Args:
      text: the attempt.
      solution, gold: the reference's equations and answer.
      found: the attempt's answer, None if it has none; `correct`: whether that equals `gold`.

    Raises:
      ValueError: the rule does not know the solution (`covers`), or answer and text do not agree.
    """
    fault = _fault(solution, gold)
    if fault:
        raise ValueError(f"the rule does not know the solution {solution!r}: {fault}")
    attempt, needed = split(text), equations(solution)
    if (found is None and correct) or (found is not None and not attempt.steps):
        raise ValueError(f"answer {found!r}, correct: {correct}: not so of the text {text!r}")
    made = _walk(equations(text), needed)
    wrong, span = _earliest(attempt, made, found is not None, correct)
    missing = len({i for _, new in made for i in new or ()}) < len(needed)
    case = "wrong" if wrong else "unfinished" if found is None else "thin" if missing else "right"
    kept = [s for s in attempt.steps if not s.final and (not wrong or s.number < wrong.number)]
    spelt = [_respell(solution[e.start : e.end], text, [m for m, _ in made]) for e in needed]
    corrected = _corrected(text, kept, made, spelt, condense=case == "unfinished")
    number = wrong.number if wrong else None
    return Verdict(case, number, span, corrected, attempt.form, attempt.status)


_Made = list[tuple[Equation, set[int] | None]]


def _walk(attempt: Sequence[Equation], needed: Sequence[Equation]) -> _Made:
    """Each equation with the results it is the first to reach; None if its value is no result."""
    out: _Made = []
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


def _earliest(
    attempt: Steps, made: _Made, answered: bool, correct: bool
) -> tuple[Step | None, tuple[int, int] | None]:
    """The earliest wrong step, and what is wrong in it."""
    for equation, new in made:
        if not equation.true or (new is None and not correct):
            holds = next(s for s in attempt.steps if s.start <= equation.start < s.end)
            return holds, (equation.start, equation.end)
    if correct or not answered:
        return None, None
    last = ([s for s in attempt.steps if s.final] or attempt.steps)[-1]
    return last, (last.start, last.end)


def _corrected(
    text: str, kept: Sequence[Step], made: _Made, spelt: Sequence[str], condense: bool
) -> tuple[str, ...]:
    lines: list[str] = []
    done: set[int] = set()
    starts = [equation.start for equation, _ in made]
    for step in kept:
        own = slice(*(bisect.bisect_left(starts, place) for place in (step.start, step.end)))
        inside = [(equation, new) for equation, new in made[own] if new]
        new = {i for _, results in inside for i in results or ()}
        lines += [spelt[i] for i in range(max(new, default=0)) if i not in done | new]
        done |= set(range(max(new, default=-1) + 1)) | new
        if condense:
            lines += [f"{text[e.start : e.end]}." for e, _ in inside]
        else:
            lines.append(text[step.start : step.end])
    return (*lines, *(line for i, line in enumerate(spelt) if i not in done))


def _respell(equation: str, text: str, models: Sequence[Equation]) -> str:
    """An equation of the solution as a step, with the signs and the spacing of the attempt's."""
    signs: dict[str, str] = {}
    for model in models:
        for token in _TOKEN.finditer(text, model.start, model.end):
            if token["sign"]:
                signs.setdefault(_SIGNS.get(token[0], "*"), token[0])
    written = [
        signs.get(_SIGNS.get(token[0], "*"), token[0]) if token["sign"] else token[0]
        for token in _TOKEN.finditer(equation)
    ]
    if models and not re.search(r"\s", text[models[0].start : models[0].end]):
        written = [part for part in written if not part.isspace()]
    return "".join(written) + "."
