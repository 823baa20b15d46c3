"""Graders, which extract an answer from a text and compare the answer with the gold answer.

Most answers are numbers or words, and are compared as strings. All other answers are compared by
math-verify in worker processes, with limits on time and memory. Limits are needed, because a short
formula can make sympy compute for hours or fill the memory. Sympy's own limits use signals, which
cannot interrupt C code. A worker that exceeds a limit is killed and replaced. If a worker is
killed, the comparison raises no exception, but returns a status, which the evaluation counts.

A worker is a process `python -m copsd_jax.rewards.graders` with two pipes. Each question and each
reply is one line of JSON. A worker is started when it is first needed. Workers are not forked,
because JAX has threads, and a forked copy of a process with threads may hang. Text written by a
model is never executed, so only the LaTeX parser of math-verify is used. The plain-expression
parser of math-verify is not used, because it calls sympy's `parse_expr`, which evaluates Python.
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
OTHERS = ("choice", "none")  # answer forms that other kinds of reward use
PLACES = ("last_after_think", "last_anywhere")
STATUSES = (
    "plain",  # decided from strings and exact numbers
    "symbolic",  # decided by math-verify
    "unparsed",  # math-verify cannot parse one of the answers; counted as not equal
    "timeout",  # the time limit was reached; counted as not equal
    "died",  # the worker ended, usually at its memory limit; counted as not equal
    "too_long",  # not equal as strings, and too long for math-verify; counted as not equal
    "no_answer",  # the text has no answer of the requested form
)
UNRESOLVED = ("timeout", "died", "too_long")  # undecided, but counted as wrong

_LONGEST = 1000  # maximum length of an answer that is parsed as a number or by math-verify
_START_SECONDS = 120.0  # time limit for a worker to import sympy on a busy machine
_CACHED = 100_000  # maximum number of math-verify comparisons that are remembered

# Arabic percent, decimal and thousands signs; full-width signs; minus signs and hyphens.
_SIGNS = str.maketrans(
    "\u066a\u066b\u066c\uff0e\uff0c\uff0f\uff05\uff0b\uff1a\uff0d\ufe63\u2212\u2010\u2011\u2013",
    "%.,.,/%+:------",
)
# The length of a numeral is limited to 32 characters, because each ፼ makes the number 10,000 times
# as large.
_ETHIOPIC = re.compile("(?<![\u1369-\u137c])[\u1369-\u137c]{1,32}(?![\u1369-\u137c])")
_ETHIOPIC_PAIR = "[\u1372-\u137a]?[\u1369-\u1371]?"  # tens and ones
_ETHIOPIC_GROUP = re.compile(f"(?:({_ETHIOPIC_PAIR})(\u137b))?({_ETHIOPIC_PAIR})")  # 0..9999


def _ethiopic(run: str) -> str:
    """Converts one Ge'ez numeral to ASCII digits; returns a malformed numeral unchanged.

    Ge'ez numerals are not positional: ፪፻፴ is 2 x 100 + 30, and ፼ multiplies the number before
    it by 10,000.
    """
    total = 0
    for index, group in enumerate(run.split("\u137c")):
        match = _ETHIOPIC_GROUP.fullmatch(group)
        if match is None:
            return run
        # If no numeral comes before ፼ or ፻, ፼ means 10,000 and ፻ means 100.
        total = (total or min(index, 1)) * 10_000 + _pair(match[3])
        total += (_pair(match[1]) or 1) * 100 if match[2] else 0
    return str(total)


def _pair(text: str) -> int:
    return sum(int(unicodedata.numeric(c)) for c in text)


def fold_digits(text: str) -> str:
    """Converts digits, signs and separators of every script to ASCII.

    The function converts all decimal digits of Unicode (category Nd, including full-width forms),
    the Ge'ez numerals of Amharic and Tigrinya, the Arabic separators and the full-width signs.
    Characters such as ² or ½ are kept, because they are not decimal digits.
    """
    if text.isascii():
        return text
    text = _ETHIOPIC.sub(lambda match: _ethiopic(match[0]), text.translate(_SIGNS))
    folded = (str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)
    # The Arabic comma also separates words, so it is a thousands separator only between digits.
    return re.sub("(?<=[0-9])\u060c(?=[0-9])", ",", "".join(folded))


_ANSWER_IS = re.compile(r"\bthe\s+(?:final\s+)?answer\s+is\b[^\S\n]*:?[^\S\n]*", re.IGNORECASE)
# A sentence ends at a full stop before white space, so 3.5 is not split.
_SENTENCE_END = re.compile("[.!?](?=\\s|$)|[\u3002\uff01\uff1f\u0964\u1362\u06d4\u061f]|\n")


def extract_answer(text: str, pattern: str, where: str) -> str | None:
    r"""Extracts the answer from a text, exactly as written; returns None if there is no answer.

    Args:
      text: the completion.
      pattern: `boxed` extracts the content of the last `\boxed{...}` or `\boxed x`. Braces must
        balance; `\{` and `\}` do not count as braces. If the last box is never closed, there is no
        answer, as in the reference code. `answer_is` extracts the text after the last "The answer
        is", up to the end of the sentence or line.
      where: `last_after_think` searches after the last `</think>`. If a `<think>` is open at the
        end of the text, there is no answer yet. A text without think tags is searched as a whole.
        If the prompt opened a think block, the caller must put `<think>` in front of the text.
        `last_anywhere` searches the whole text.

    Raises:
      ValueError: the value of `pattern` or `where` is unknown.
    """
    for name, value, choices in (("pattern", pattern, PATTERNS), ("where", where, PLACES)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}: the choices are {', '.join(choices)}")
    if where == "last_after_think":
        closed = text.rfind("</think>")
        if text.rfind("<think>") > closed:
            return None
        text = text if closed < 0 else text[closed + len("</think>") :]
    return (_boxed(text) if pattern == "boxed" else _answer_is(text)) or None


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
    """Returns the text in the braces at the start of `body`, or None if they are never closed."""
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
# Words that change the value of the number before them, and are therefore not units.
_SCALES = frozenset(
    """hundred thousand million millions billion billions trillion dozen percent half pi cent mille
    million milliard milliards cien mil millón millones mia elfu milioni""".split()
)


def _fold(text: str) -> str:
    """Folds digits and spacing to ASCII, and drops currency signs and invisible characters."""
    text = fold_digits(unicodedata.normalize("NFC", text)).replace("\\$", "")
    kept = (c for c in text if c.isascii() or unicodedata.category(c) not in ("Cf", "Sc"))
    text = _SPACING.sub(lambda match: _blank(match[0]), "".join(kept))
    return " ".join(text.replace("$", "").replace("\0", " ").split()).removesuffix(".")


def _tidy(text: str) -> str:
    r"""Folds a text with `_fold`, and replaces \text{...} with its content."""
    return " ".join(_TEXT.sub(r" \1 ", _fold(text)).split())


def _blank(spacing: str) -> str:
    return "," if spacing == "{,}" else "" if spacing in ("\\!", "\\left", "\\right") else " "


def _parse_answer_number(text: str, comma: bool = False) -> str | None:
    """Returns a number in canonical digits ("-12.5"), or None if the text is not a number.

    Thousands may be separated by a comma, a blank, an apostrophe, or a dot that cannot be a decimal
    point. Indian grouping (1,00,000) is also read. If `comma` is set, "12,5" is read as 12.5, but
    "1,234" is still read as 1234.
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


def _parse_answer_fraction(text: str) -> fractions.Fraction | None:
    """Returns the exact value of a number, fraction or mixed number; None for any other text."""
    if len(text) > _LONGEST:
        return None
    if number := _parse_answer_number(text):
        return fractions.Fraction(number)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    above = _parse_answer_number(match["a"] or match["c"] or match["e"])
    below = _parse_answer_number(match["b"] or match["d"] or match["f"])
    if above is None or below in (None, "0"):
        return None
    value = int(match["whole"] or 0) + fractions.Fraction(above) / fractions.Fraction(below)
    return -value if match[1] == "-" else value


def normalize(text: str) -> str:
    """Normalizes an answer to the form in which two answers are compared as strings.

    Digits of every script become ASCII digits. A number loses its thousands separators, leading
    zeros, and trailing zeros after the decimal point. Any other text becomes lower case and loses
    its blanks, except blanks between digits, because "1 1/2" is not 11/2.
    """
    tidy = _tidy(text)
    return _parse_answer_number(tidy) or re.sub(r"(?<!\d) | (?!\d)", "", tidy).casefold()


def _same_number(gold: str, answer: str) -> bool | None:
    """Tells whether two tidied texts are the same number; returns None if undecided."""
    for one, other in ((gold, answer), (answer, gold)):
        number = _parse_answer_number(one)
        if number is None:
            continue
        unit = _UNIT.fullmatch(other) if len(other) <= _LONGEST else None
        if unit and not _SCALES.intersection(unit[2].casefold().split()):
            other = unit[1]
        # One side is a number, so "3,5" on the other side has a decimal comma and is not a list.
        digits = _parse_answer_number(other, comma=True)
        if digits is not None:
            return digits == number
    left = _parse_answer_fraction(gold)
    # Unequal fractions are left undecided, because 0.333333 may be a rounded 1/3.
    return True if left is not None and left == _parse_answer_fraction(answer) else None


def compare_plainly(gold: str, answer: str) -> bool | None:
    """Compares two answers as strings and as exact numbers; returns None if undecided."""
    if normalize(gold) == normalize(answer):
        return True
    gold, answer = _tidy(gold), _tidy(answer)
    same = _same_number(gold, answer)
    if same is not None:
        return same
    # math-verify reads a word as a product of letters, so "saw" would equal "was".
    words = [side for side in (gold, answer) if len(side) > 3 and side.replace(" ", "").isalpha()]
    if words and all(
        side in words or _parse_answer_number(side) is not None for side in (gold, answer)
    ):
        return False
    return None


class _Worker:
    """A process that compares answers by math-verify; `ask` starts the process when needed."""

    def __init__(self, memory: int):
        self._memory = memory
        self._process: Any = None  # a subprocess.Popen while the process runs
        self._unread = b""

    def ask(self, gold: str, answer: str, seconds: float) -> str:
        """Compares two answers; returns `equal`, `unequal`, `unparsed`, `timeout` or `died`."""
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
        # The worker has its own session, so Ctrl-C reaches only the run, which closes its workers.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "copsd_jax.rewards.graders", str(self._memory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        reply = self._receive(_START_SECONDS)
        if reply != "ready":
            self.close()
            raise RuntimeError(
                f"the grader's worker did not start ({reply}): `{sys.executable} -c 'import "
                "math_verify'` shows why"
            )

    def _send(self, question: list) -> None:
        with contextlib.suppress(BrokenPipeError):  # if the worker ended, `_receive` returns `died`
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, seconds: float) -> str:
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
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # part of a question may be unsent
                pipe.close()
        self._process, self._unread = None, b""


def _run_grader_worker(memory: int) -> None:
    """Runs a worker, which answers each line of JSON with one line until the input ends."""
    import logging
    import resource
    import signal

    # If a machine shuts down, all its processes get SIGTERM. Without its workers, the run would
    # grade the step that it still completes differently. The run ends its workers itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":  # macOS refuses a limit on the address space
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the replies
    import math_verify

    reading = [math_verify.LatexExtractionConfig()]

    def compare(gold: str, answer: str) -> str:
        left, right = (
            math_verify.parse(f"${text}$", reading, fallback_mode="no_fallback", parsing_timeout=0)
            for text in (gold, answer)
        )
        same = left and right and math_verify.verify(left, right, timeout_seconds=0)
        return "equal" if same else "unequal" if left and right else "unparsed"

    compare("x+1", r"\frac{x}{2}")  # the first call builds tables, so no time limit applies here
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        # If the parent process is gone, the alarm ends this process, even while C code runs.
        signal.alarm(int(seconds) + 5)
        print(json.dumps(compare(gold, answer)), file=replies, flush=True)
        signal.alarm(0)


@dataclasses.dataclass(frozen=True)
class Grade:
    """The grade of one text; `answer` is the answer as written, or None if there is no answer."""

    answer: str | None
    correct: bool
    status: str  # one of STATUSES


class Grader:
    """A context manager that extracts and compares answers, and owns worker processes.

    Args:
      pattern: a pattern of `extract_answer`, or one of OTHERS. A grader whose pattern is in OTHERS
        can compare answers, but cannot extract them.
      where: the same as for `extract_answer`.
      seconds: the time limit of one comparison by math-verify.
      workers: maximum number of processes; a process is started only when an answer needs one.
      memory: maximum address space of each worker, in bytes (Linux only).
    """

    def __init__(
        self, pattern: str, where: str, seconds: float, workers: int = 2, memory: int = 2 << 30
    ):
        # Refuses unknown names.
        extract_answer("", PATTERNS[0] if pattern in OTHERS else pattern, where)
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
        """Ends the workers; a later comparison starts new workers."""
        for worker in self._workers:
            worker.close()

    def compare(self, gold: str, answer: str) -> tuple[bool, str]:
        """Compares two answers; returns (equal, status). An undecided pair counts as not equal."""
        plain = compare_plainly(gold, answer)
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

    def grade_all(self, pairs: Iterable[tuple[str, str]]) -> list[Grade]:
        """Grades (gold, text) pairs; returns the grades in the same order.

        A pair of answers that occurs several times is compared only once.

        Raises:
          ValueError: a gold answer is empty.
        """
        found = []
        for index, (gold, text) in enumerate(pairs):
            if not gold.strip():
                raise ValueError(f"the gold answer of pair {index} is empty")
            found.append((gold, extract_answer(text, self._pattern, self._where)))
        wanted = list(dict.fromkeys(pair for pair in found if pair[1] is not None))
        with concurrent.futures.ThreadPoolExecutor(len(self._workers)) as threads:
            compared = threads.map(lambda pair: self.compare(*pair), wanted)
            verdicts = dict(zip(wanted, compared, strict=True))
        none = (False, "no_answer")
        return [Grade(pair[1], *verdicts.get(pair, none)) for pair in found]

    def same_class(self, answers: Sequence[str | None]) -> list[int]:
        """Groups equal answers; returns the index of each answer's class.

        Classes are numbered in order of first appearance. An answer is compared with the first
        answer of each class. The class of None is -1.
        """
        firsts: list[str] = []

        def classify(answer: str) -> int:
            for k, first in enumerate(firsts):
                if self.compare(first, answer)[0]:
                    return k
            firsts.append(answer)
            return len(firsts) - 1

        return [-1 if answer is None else classify(answer) for answer in answers]


if __name__ == "__main__":
    _run_grader_worker(int(sys.argv[1]))
