"""Graders, which extract an answer from a text and compare the answer with the gold answer.

Most answers are numbers, quantities or words, and are compared by `comparison`. Formulas are
compared by math-verify in worker processes, which have limits on time and memory. If a worker is
killed, the comparison raises no exception, but returns a status, which the evaluation counts.
"""

import concurrent.futures
import dataclasses
import queue
import time
from collections.abc import Iterable, Sequence

from copsd_jax.rewards import comparison, extraction, notation, numerals, units, worker_process

OTHERS = ("choice", "none")  # answer forms that other kinds of reward use
GRADERS = ("strict", "published")
STATUSES = (
    "plain",  # decided by comparing strings and exact numbers
    "symbolic",  # decided by math-verify
    "unparsed",  # math-verify cannot parse one of the answers; counted as not equal
    "timeout",  # the time limit was reached; counted as not equal
    "died",  # the worker ended, usually at its memory limit; counted as not equal
    "too_long",  # not equal as strings, and too long for math-verify; counted as not equal
    "no_answer",  # the text has no answer of the requested form
)
UNRESOLVED = ("timeout", "died", "too_long")  # undecided, but counted as wrong

_CACHED = 100_000  # maximum number of entries in each cache of a grader
_CLASS_LIMITS = 6  # after this many times `seconds`, a vote no longer uses math-verify

Verdict = tuple[bool, str]  # (equal, status)


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
      kind: `strict`, or `published`, which also accepts the pairs that math-verify accepts.
      policy: which words an answer may leave out; one of `units.POLICIES`.
      workers: maximum number of processes; a process is started only when an answer needs one.
      memory: maximum address space of each worker, in bytes (Linux only).

    Raises:
      ValueError: a name is unknown.
    """

    def __init__(
        self, pattern: str, where: str, seconds: float, kind: str = "strict",
        policy: str = "words", workers: int = 2, memory: int = 2 << 30,
    ):  # fmt: skip
        # This call refuses unknown values of `pattern` and `where`.
        extraction.extract_answer("", "boxed" if pattern in OTHERS else pattern, where)
        for name, value, choices in (("kind", kind, GRADERS), ("policy", policy, units.POLICIES)):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}: the choices are {', '.join(choices)}")
        self._pattern, self._where, self._seconds = pattern, where, seconds
        self._kind, self._policy = kind, policy
        self._workers = [worker_process.Worker(memory) for _ in range(workers)]
        self._idle: queue.SimpleQueue[worker_process.Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._cache: dict[tuple[str, str, bool], str] = {}
        self._heavy: dict[str, str] = {}  # formula that exceeds a limit by itself -> status

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; a later comparison starts new workers."""
        for worker in self._workers:
            worker.close()

    def compare(self, gold: str, answer: str) -> Verdict:
        """Compares two answers; returns (equal, status). An undecided pair counts as not equal."""
        same, status = self._compare_strictly(gold, answer)
        if same or self._kind == "strict":
            return same, status
        # math-verify also reads decimal commas in the gold answer.
        if comparison.compare_plainly(answer, gold, self._policy):
            return True, "plain"
        folded = [notation.fold(text) for text in (gold, answer)]
        reply = self._ask(folded[0], folded[1], strict=False)
        return (True, "symbolic") if reply == "equal" else (same, status)

    def _compare_strictly(self, gold: str, answer: str) -> Verdict:
        plain = comparison.compare_plainly(gold, answer, self._policy)
        if plain is not None:
            return plain, "plain"
        (left, stated), (right, other) = (
            comparison.prepare_formula(text, self._policy) for text in (gold, answer)
        )
        if (stated and other and not stated & other) or (
            self._policy == "same" and bool(stated) != bool(other)
        ):
            return False, "plain"
        reply = self._ask(left, right, strict=True)
        return reply == "equal", "symbolic" if reply in ("equal", "unequal") else reply

    def _ask(self, gold: str, answer: str, strict: bool) -> str:
        """Sends each pair to a worker once; sends no formula that is recorded in `_heavy`."""
        if max(len(gold), len(answer)) > numerals.LONGEST:
            return "too_long"
        key = (gold, answer, strict)
        if key in self._cache:
            return self._cache[key]
        for text in (gold, answer):
            if text in self._heavy:
                return self._heavy[text]
        worker = self._idle.get()
        try:
            reply = worker.ask(gold, answer, self._seconds, strict)
        finally:
            self._idle.put(worker)
        if len(self._cache) < _CACHED:
            self._cache[key] = reply
        return reply

    def _find_heavy(self, *answers: str) -> None:
        """Records the formulas that exceed a limit even in a comparison with the number 1."""
        for answer in answers:
            formula = comparison.prepare_formula(answer, self._policy)[0]
            reply = self._ask(formula, "1", strict=True)
            if reply in ("timeout", "died") and len(self._heavy) < _CACHED:
                self._heavy[formula] = reply

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
            found.append((gold, extraction.extract_answer(text, self._pattern, self._where)))
        wanted = list(dict.fromkeys(pair for pair in found if pair[1] is not None))
        with concurrent.futures.ThreadPoolExecutor(len(self._workers)) as threads:
            compared = threads.map(lambda pair: self.compare(*pair), wanted)
            verdicts = dict(zip(wanted, compared, strict=True))
        none = (False, "no_answer")
        return [Grade(pair[1], *verdicts.get(pair, none)) for pair in found]

    def same_class(self, answers: Sequence[str | None]) -> list[int]:
        """Groups equal answers; returns the index of each answer's class.

        Classes are numbered in order of first appearance. An answer is compared with the first
        answer of each class. The class of None is -1. If several answers are equal strings, only
        the first of these answers is compared. If the grouping takes longer than `_CLASS_LIMITS`
        times `seconds`, all further comparisons are made without math-verify.
        """
        deadline = time.monotonic() + _CLASS_LIMITS * self._seconds
        firsts: list[str] = []
        classes: dict[str, int] = {}

        def are_equal(first: str, answer: str) -> bool:
            if time.monotonic() < deadline:
                same, status = self.compare(first, answer)
                if status in ("timeout", "died"):
                    self._find_heavy(first, answer)
                return same
            return comparison.compare_plainly(first, answer, self._policy) is True

        for answer in answers:
            if answer is None or answer in classes:
                continue
            equal = (k for k, first in enumerate(firsts) if are_equal(first, answer))
            classes[answer] = next(equal, len(firsts))
            if classes[answer] == len(firsts):
                firsts.append(answer)
        return [-1 if answer is None else classes[answer] for answer in answers]
