"""Finds the answer in a text and decides whether it equals the gold answer.

Most answers are numbers or words, and are decided here, on strings. What is left goes to
math-verify in worker processes under a time and a memory limit: sympy can be made to compute for
hours or to fill the memory by a short formula, and its limits by signals do not interrupt C code. A
worker that oversteps is killed and replaced; the outcome is a status that evaluation counts, never
an exception.

A worker is `python -m copsd_jax.rewards.graders` behind two pipes with one JSON line per question,
started when first needed. It is no fork: JAX has threads, and a forked copy of a threaded process
may hang. Nothing that a model wrote is ever executed: of math-verify only the LaTeX reader is used,
since its reader of plain expressions hands the text to sympy's `parse_expr`, which evaluates
Python.
"""

import concurrent.futures
import contextlib
import dataclasses
import fractions
import json
import os
import pathlib
import queue
import re
import select
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

PATTERNS = ("boxed", "answer_is")
OTHERS = ("choice", "none")  # forms of answers that other kinds of reward read
PLACES = ("last_after_think", "last_anywhere")
STATUSES = {
    "plain": "decided on strings and exact numbers",
    "symbolic": "decided by math-verify",
    "unparsed": "math-verify cannot read one of the two: not equal",
    "timeout": "the time limit was hit: counted as not equal",
    "died": "the worker ended, as a rule at its memory limit: counted as not equal",
    "too_long": "not equal as strings, and too long for math-verify: counted as not equal",
    "no_answer": "the text has no answer of the asked form",
}
UNRESOLVED = ("timeout", "died", "too_long")  # wrong for want of a decision

_LONGEST = 1000  # characters of an answer that is read as a number or by math-verify
_START_SECONDS = 120.0  # for a worker to import sympy on a busy machine
_CACHED = 100_000  # comparisons by math-verify that are remembered

# Arabic percent, decimal and thousands signs; full-width signs; minus signs and hyphens.
_SIGNS = str.maketrans(
    "\u066a\u066b\u066c\uff0e\uff0c\uff0f\uff05\uff0b\uff1a\uff0d\ufe63\u2212\u2010\u2011\u2013",
    "%.,.,/%+:------",
)
# At most 32 characters: each ፼ of a longer run would make the number 10,000 times as large.
_ETHIOPIC = re.compile("(?<![\u1369-\u137c])[\u1369-\u137c]{1,32}(?![\u1369-\u137c])")
_ETHIOPIC_PAIR = "[\u1372-\u137a]?[\u1369-\u1371]?"  # tens and ones
_ETHIOPIC_GROUP = re.compile(f"(?:({_ETHIOPIC_PAIR})(\u137b))?({_ETHIOPIC_PAIR})")  # 0..9999


def _ethiopic(run: str) -> str:
    """The ASCII digits of one Ge'ez numeral; a malformed one as it is.

    Ge'ez numbers have no places: ፪፻፴ is 2 x 100 + 30, and ፼ multiplies all before it by 10,000.
    """
    total = 0
    for index, group in enumerate(run.split("\u137c")):
        match = _ETHIOPIC_GROUP.fullmatch(group)
        if match is None:
            return run
        # A ፼ or ፻ with nothing before it is one times itself.
        total = (total or min(index, 1)) * 10_000 + _pair(match[3])
        total += (_pair(match[1]) or 1) * 100 if match[2] else 0
    return str(total)


def _pair(text: str) -> int:
    return sum(int(unicodedata.numeric(c)) for c in text)


def fold_digits(text: str) -> str:
    """`text` with the digits of every script as ASCII, and with ASCII signs and separators.

    Covers all of Unicode's decimal digits (category Nd, full-width forms among them), the Ge'ez
    numerals of Amharic and Tigrinya, the Arabic separators and the full-width signs. Characters
    such as ² or ½, which are no decimal digits, stay.
    """
    if text.isascii():
        return text
    text = _ETHIOPIC.sub(lambda match: _ethiopic(match[0]), text.translate(_SIGNS))
    folded = (str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    # The Arabic comma lists words too: it is a separator of thousands only between digits.
    return re.sub("(?<=[0-9])\u060c(?=[0-9])", ",", "".join(folded))


_ANSWER_IS = re.compile(r"\bthe\s+(?:final\s+)?answer\s+is\b[^\S\n]*:?[^\S\n]*", re.IGNORECASE)
# A sentence ends at a stop with a blank behind it, so that 3.5 stays whole.
_SENTENCE_END = re.compile("[.!?](?=\\s|$)|[\u3002\uff01\uff1f\u0964\u1362\u06d4\u061f]|\n")


def extract(text: str, pattern: str, where: str) -> str | None:
    r"""The answer that `text` states, as it is written there, or None.

    Args:
      pattern: `boxed` takes the content of the last `\boxed{...}` (balanced, `\{` and `\}` do not
        count) or `\boxed x`; a last box that never closes is no answer, as in the reference.
        `answer_is` takes what follows the last "The answer is", to the end of sentence or line.
      where: `last_after_think` looks behind the last `</think>` only. Where a `<think>` is open
        at the end there is no answer yet. A text without either is all answer; a caller whose
        prompt opened the block puts `<think>` in front. `last_anywhere` looks everywhere.

    Raises:
      ValueError: for an unknown pattern or place.
    """
    for name, value, choices in (("pattern", pattern, PATTERNS), ("where", where, PLACES)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}: the choices are {', '.join(choices)}")
    if where == "last_after_think":
        closed = text.rfind("</think>")
        if text.rfind("<think>") > closed:
            return None
        text = text if closed < 0 else text[closed + len("</think>") :]
    found = _boxed(text) if pattern == "boxed" else _answer_is(text)
    return found or None


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed")
    if start < 0:
        return None
    rest = text[start + len("\\boxed") :]
    body = rest.lstrip()
    if body.startswith("{"):
        return _braced(body)
    if rest[:1].isalpha():  # \boxedfoo is another command
        return None
    match = re.match(r"[^\s$]+", body)
    return match[0].rstrip(".,;:!?") if match else None


def _braced(body: str) -> str | None:
    """The content of the braces that `body` starts with, or None if they never close."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", body, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return body[1 : match.start()].strip()
    return None


def _answer_is(text: str) -> str | None:
    starts = [match.end() for match in _ANSWER_IS.finditer(text)]
    if not starts:
        return None
    end = _SENTENCE_END.search(text, starts[-1])
    sentence = text[starts[-1] : end.start() if end else len(text)]
    if "\\boxed" in sentence:
        return _boxed(sentence)
    quotes = " \t\r*`\"'$"
    return sentence.lstrip(quotes).rstrip(quotes + ".,;:!?")


_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|~|\s+|\\left(?![a-z])|\\right(?![a-z])|\{,\}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(
    r"""([+-]?)(?:\\[dt]?frac\ ?(?:\{(?P<a>[+-]?[\d.,]+)\}\ ?\{(?P<b>[\d.,]+)\}|(?P<c>\d)(?P<d>\d))
    | (?:(?P<whole>\d+)\ )?(?P<e>[\d.,]+)\ ?/\ ?(?P<f>[\d.,]+))""",
    re.VERBOSE,
)
_NUMBER = re.compile(
    r"""([+-]?)(?:
      (?P<plain>\d+\.?|\d*\.\d+)
    | (?P<grouped>[1-9]\d{0,2}(?P<mark>[, '’])\d{3}(?:(?P=mark)\d{3})*(?:\.\d+)?)
    | (?P<indian>\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?)
    | (?P<dots>[1-9]\d{0,2}(?:\.\d{3}){2,}|[1-9]\d{0,2}(?:[. ]\d{3})+,\d+)
    | (?P<comma>\d+,\d+)
    )""",
    re.VERBOSE,
)
_UNIT = re.compile(r"([+-]?\d[\d.,'’ ]*?) ([^\W\d_]{2,}(?: [^\W\d_]{2,})*)")
# Words behind a number that change it, so that they are no unit.
_SCALES = frozenset(
    """hundred thousand million millions billion billions trillion dozen percent half pi cent mille
    million milliard milliards cien mil millón millones mia elfu milioni""".split()
)


def _fold(text: str) -> str:
    """Folded digits, single blanks; without $, currency signs and invisible characters."""
    text = fold_digits(unicodedata.normalize("NFC", text)).replace("\\$", "")
    kept = (c for c in text if c.isascii() or unicodedata.category(c) not in ("Cf", "Sc"))
    text = _SPACING.sub(lambda match: _blank(match[0]), "".join(kept))
    return " ".join(text.replace("$", "").replace("\0", " ").split()).removesuffix(".")


def _tidy(text: str) -> str:
    r"""`_fold`, and the words of \text{...} as bare words."""
    return " ".join(_TEXT.sub(r" \1 ", _fold(text)).split())


def _blank(spacing: str) -> str:
    return "," if spacing == "{,}" else "" if spacing in ("\\!", "\\left", "\\right") else " "


def _number(text: str, comma: bool = False) -> str | None:
    """A number's canonical digits ("-12.5") or None; with `comma`, also "12,5" for 12.5.

    Thousands may be grouped by comma, blank or apostrophe, in India's way, or by dots where that
    cannot be a decimal point. "1,234" is always 1234.
    """
    match = _NUMBER.fullmatch(text)
    if match is None or (match["comma"] and not comma):
        return None
    digits = text[len(match[1]) :]
    if match["dots"] or match["comma"]:
        digits = digits.replace(".", "").replace(",", ".")
    whole, _, part = re.sub("[, '’]", "", digits).partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return f"-{number}" if match[1] == "-" and number != "0" else number


def _fraction(text: str) -> fractions.Fraction | None:
    """The exact value of a number, a fraction of two numbers or a mixed number, or None."""
    if len(text) > _LONGEST:
        return None
    number = _number(text)
    if number is not None:
        return fractions.Fraction(number)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above = _number(match["a"] or match["c"] or match["e"])
    below = _number(match["b"] or match["d"] or match["f"])
    if above is None or below in (None, "0"):
        return None
    value = int(match["whole"] or 0) + fractions.Fraction(above) / fractions.Fraction(below)
    return -value if match[1] == "-" else value


def normalize(text: str) -> str:
    """The form in which two answers are compared as strings.

    Digits of every script folded; a number without thousands separators, leading and trailing
    zeros; otherwise lower case and without blanks, except between digits ("1 1/2" is not 11/2).
    """
    tidy = _tidy(text)
    number = _number(tidy)
    if number is not None:
        return number
    return re.sub(r"(?<!\d) | (?!\d)", "", tidy).casefold()


def _same_number(gold: str, answer: str) -> bool | None:
    """Whether two tidied texts are the same number; None if that cannot be said of them."""
    for one, other in ((gold, answer), (answer, gold)):
        number = _number(one)
        if number is None:
            continue
        unit = _UNIT.fullmatch(other) if len(other) <= _LONGEST else None
        if unit and not _SCALES.intersection(unit[2].casefold().split()):
            other = unit[1]
        # Beside a number, "3,5" is a decimal comma rather than a list.
        digits = _number(other, comma=True)
        if digits is not None:
            return digits == number
    left, right = _fraction(gold), _fraction(answer)
    # Unequal fractions go on: 0.333333 for 1/3 is a question of rounding.
    return True if left is not None and left == right else None


def plainly_equal(gold: str, answer: str) -> bool | None:
    """Whether two answers are equal, if strings and exact numbers can tell; None if they cannot."""
    if normalize(gold) == normalize(answer):
        return True
    gold, answer = _tidy(gold), _tidy(answer)
    same = _same_number(gold, answer)
    if same is not None:
        return same
    # math-verify takes a word for a product of letters, in which "saw" equals "was".
    words = [side for side in (gold, answer) if len(side) > 3 and side.replace(" ", "").isalpha()]
    if words and all(side in words or _number(side) is not None for side in (gold, answer)):
        return False
    return None


class _Worker:
    """One process that compares by math-verify; started when first asked, replaced when lost."""

    def __init__(self, memory: int):
        self._memory = memory
        self._process: subprocess.Popen | None = None
        self._unread = b""

    def ask(self, gold: str, answer: str, seconds: float) -> str:
        """`equal`, `unequal`, or one of the statuses `unparsed`, `timeout`, `died`."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        self._send([gold, answer, seconds])
        reply = self._receive(seconds)
        if reply in ("timeout", "died"):
            self.close()
        return reply

    def _start(self) -> None:
        self.close()
        package = pathlib.Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "copsd_jax.rewards.graders", str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run, which then closes its workers
        )
        reply = self._receive(_START_SECONDS)
        if reply != "ready":
            self.close()
            raise RuntimeError(
                f"the grader's worker did not start ({reply}): `{sys.executable} -c 'import "
                "math_verify'` shows why"
            )

    def _send(self, question: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: the reading side says `died`
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, seconds: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return "timeout"
            chunk = os.read(pipe, 4096)
            if not chunk:
                return "died"
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            with contextlib.suppress(BrokenPipeError):  # an unsent question to who is gone
                pipe.close()
        self._process, self._unread = None, b""


def _serve(memory: int) -> None:
    """The worker's life: one JSON line in, one out, until its input ends."""
    import logging
    import resource
    import signal

    if sys.platform == "linux":  # macOS refuses a limit of the address space
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with replies
    import math_verify

    reading = [math_verify.LatexExtractionConfig()]

    def compare(gold: str, answer: str) -> str:
        left, right = (
            math_verify.parse(f"${text}$", reading, fallback_mode="no_fallback", parsing_timeout=0)
            for text in (gold, answer)
        )
        same = left and right and math_verify.verify(left, right, timeout_seconds=0)
        return "equal" if same else "unequal" if left and right else "unparsed"

    compare("x+1", r"\frac{x}{2}")  # the first use builds tables, outside the time limit
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        # Ends this process in C code too, should the parent be gone and not there to kill it.
        signal.alarm(int(seconds) + 5)
        print(json.dumps(compare(gold, answer)), file=replies, flush=True)
        signal.alarm(0)


@dataclasses.dataclass(frozen=True)
class Grade:
    """What became of one text. `answer` as written, None exactly if not `formatted`."""

    answer: str | None
    correct: bool
    formatted: bool
    status: str  # a key of STATUSES


class Grader:
    """Extracts and compares; a context manager, since it may own worker processes.

    Args:
      pattern, where: as in `extract`; with a pattern of OTHERS it compares, and extracts nothing.
      seconds: time limit of one comparison by math-verify.
      workers: processes at most; none is started before an answer needs one.
      memory: bytes of address space of each (Linux only).
    """

    def __init__(
        self, pattern: str, where: str, seconds: float, workers: int = 2, memory: int = 2 << 30
    ):
        extract("", PATTERNS[0] if pattern in OTHERS else pattern, where)  # refuses unknown names
        self._pattern, self._where, self._seconds = pattern, where, seconds
        self._workers = [_Worker(memory) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._cache: dict[tuple[str, str], tuple[bool, str]] = {}

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; a later question would start them again."""
        for worker in self._workers:
            worker.close()

    def compare(self, gold: str, answer: str) -> tuple[bool, str]:
        """(equal, status) of two answers; not equal wherever no decision was reached."""
        plain = plainly_equal(gold, answer)
        if plain is not None:
            return plain, "plain"
        key = (_fold(gold), _fold(answer))
        if max(map(len, key)) > _LONGEST:
            return False, "too_long"
        if key in self._cache:
            return self._cache[key]
        worker = self._idle.get()
        try:
            reply = worker.ask(*key, self._seconds)
        finally:
            self._idle.put(worker)
        verdict = (reply == "equal", "symbolic" if reply in ("equal", "unequal") else reply)
        if len(self._cache) < _CACHED:
            self._cache[key] = verdict
        return verdict

    def grade(self, gold: str, text: str) -> Grade:
        """Grades one text; `grade_all` keeps all workers busy."""
        return self.grade_all([(gold, text)])[0]

    def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        """Grades (gold, text) pairs, in their order; equal pairs of answers are compared once.

        Raises:
          ValueError: for an empty gold answer.
        """
        found = []
        for index, (gold, text) in enumerate(pairs):
            if not gold.strip():
                raise ValueError(f"the gold answer of pair {index} is empty")
            found.append((gold, extract(text, self._pattern, self._where)))
        wanted = list(dict.fromkeys(pair for pair in found if pair[1] is not None))
        with concurrent.futures.ThreadPoolExecutor(len(self._workers)) as threads:
            compared = threads.map(lambda pair: self.compare(*pair), wanted)
            verdicts = dict(zip(wanted, compared, strict=True))
        grades = {(g, a): Grade(a, same, True, why) for (g, a), (same, why) in verdicts.items()}
        return [grades.get(pair, Grade(None, False, False, "no_answer")) for pair in found]

    def same_class(self, answers: Sequence[str | None]) -> list[int]:
        """For each answer the number of its class of equal answers, counted by first seen.

        An answer is compared with the first of each class. None has no class: -1.
        """
        firsts: list[str] = []
        classes = []
        for answer in answers:
            if answer is None:
                classes.append(-1)
                continue
            same = (k for k, first in enumerate(firsts) if self.compare(first, answer)[0])
            classes.append(next(same, len(firsts)))
            firsts += [answer] if classes[-1] == len(firsts) else []
        return classes


def equal(gold: str, answer: str, seconds: float) -> bool:
    """Whether two answers are equal. May start a worker of its own: a `Grader` is for many."""
    with Grader("boxed", "last_anywhere", seconds, workers=1) as grader:
        return grader.compare(gold, answer)[0]


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
