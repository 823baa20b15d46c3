"""Computes scores with confidence intervals, and compares the scores of two runs."""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # 97.5th percentile of the standard normal distribution
RESAMPLES = 10_000


def compute_score_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns (mean, low, high): the mean score of the problems, and the mean's 95 % interval.

    The interval is Wilson's score interval (1927) for the effective number of problems
    n = mean * (1 - mean) / (variance / number of problems). If all scores are 0 or 1, the effective
    number equals the number of problems. If scores are means of several samples, the effective
    number is larger than the number of problems. Unlike mean ± 1.96 standard errors, Wilson's
    interval stays in [0, 1], and its width is never 0.

    Args:
      values: the score of each problem, in [0, 1]; the score is the mean over the problem's
        samples. Because a problem's samples are not independent, they count as a single score.

    Raises:
      ValueError: if there are no values, or if a value is outside [0, 1].
    """
    scores = _shares(values)
    mean, variance = float(scores.mean()), float(scores.var())
    n = len(scores)
    size = n * mean * (1 - mean) / variance if variance > 0 else float(n)
    centre = (mean + Z95**2 / (2 * size)) / (1 + Z95**2 / size)
    half = Z95 / (1 + Z95**2 / size)
    half *= math.sqrt(mean * (1 - mean) / size + Z95**2 / (4 * size**2))
    return mean, max(0.0, centre - half), min(1.0, centre + half)


class Paired(NamedTuple):
    """A mean difference (after minus before), with its 95 % interval and its two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float


def compare_paired_scores(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Paired:
    """Compares the scores of two runs on the same problems, in the same order.

    The interval comes from a percentile bootstrap over problems, with 10,000 resamples of the
    differences. The p-value comes from the exact two-sided sign test on the problems whose score
    changed. If all scores are 0 or 1, the sign test is McNemar's exact test.

    Args:
      before: one score in [0, 1] per problem. If a problem has several samples or seeds, average
        the scores first, because whole problems are resampled.
      after: the scores of the second run, in the same form and order as `before`.
      seed: the seed of the resampling.

    Raises:
      ValueError: if the numbers of problems differ, if there are no problems, or if a value is
        outside [0, 1].
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before and {len(after)} after cannot be paired")
    differences = _shares(after) - _shares(before)
    n = len(differences)
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // n)  # number of resamples per block, which bounds the memory
    means = []
    for start in range(0, RESAMPLES, rows):
        draw = rng.integers(n, size=(min(rows, RESAMPLES - start), n))
        means.append(differences[draw].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    return Paired(float(differences.mean()), float(low), float(high), sign_test(up, down))


def sign_test(up: int, down: int) -> float:
    """Returns the exact two-sided p-value of a sign test with `up` rises and `down` falls."""
    n = up + down
    tail = sum(math.comb(n, k) for k in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2**n)


def _shares(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"one score per problem is needed, not an array of shape {array.shape}")
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"scores must be in [0, 1], not in [{array.min()}, {array.max()}]")
    return array


# ---- scores ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
    """One graded completion: its length, and the `answer`, `correct` and `status` of its Grade."""

    answer: str | None
    correct: bool
    status: str
    tokens: int
    truncated: bool  # whether the completion ended at the token limit


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimates the probability that at least one of k samples is correct, if c of n are correct.

    The unbiased estimate is 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, equation 1).

    Raises:
      ValueError: if c or k is out of range.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def avg_at_n(correct: Sequence[bool]) -> float:
    """Returns the share of one problem's samples that are correct."""
    return sum(map(bool, correct)) / len(correct)


def maj_at_n(classes: Sequence[int], correct: Sequence[bool]) -> float:
    """Returns 1 if the largest class of equal answers is correct, else 0.

    If several classes are equally large, the class that occurs first wins.

    Args:
      classes: the class of each sample, from `graders.Grader.same_class`; class -1 does not vote.
      correct: whether each sample is correct; the first sample in a class decides for the whole
        class.
    """
    votes = collections.Counter(k for k in classes if k >= 0)
    if not votes:
        return 0.0
    winner = max(votes, key=lambda k: votes[k])  # on a tie, the first class wins
    return float(correct[list(classes).index(winner)])


def score(
    problems: Sequence[Sequence[Sample]],
    same_class: Callable[[Sequence[str | None]], list[int]],
    unresolved: Sequence[str],
) -> dict[str, float]:
    """Scores one group of problems, such as the problems in one language.

    Args:
      problems: the n samples of each problem; n is the same for all problems.
      same_class: function that groups equal answers, `graders.Grader.same_class`.
      unresolved: the statuses that mean "no decision", `graders.UNRESOLVED`.

    Returns:
      A dict with `problems`, `samples` (n), `avg_at_n` (with its interval from `low` to `high`),
      `pass_at_n`, `maj_at_n` and `mean_tokens`. The dict also has `pass_at_2`, `pass_at_4` and so
      on, for all powers of two below n. `format_rate`, `truncated`, `unresolved`, `nonfinite`
      and `failed` are shares of samples.

    Raises:
      ValueError: if there are no problems, or if the problems have no samples or different numbers
        of samples.
    """
    sizes = {len(samples) for samples in problems}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"problems must all have the same number of samples, not {sorted(sizes)}")
    n = sizes.pop()
    correct = [[sample.correct for sample in samples] for samples in problems]
    every = [sample for samples in problems for sample in samples]
    average, low, high = compute_score_interval([avg_at_n(row) for row in correct])
    out = {"problems": len(problems), "samples": n, "avg_at_n": average, "low": low, "high": high}
    names = {f"pass_at_{2**i}": 2**i for i in range(1, n.bit_length()) if 2**i < n}
    for name, k in {**names, "pass_at_n": n}.items():
        out[name] = float(np.mean([pass_at_k(n, sum(row), k) for row in correct]))
    votes = [same_class([sample.answer for sample in samples]) for samples in problems]
    out["maj_at_n"] = float(np.mean([maj_at_n(v, c) for v, c in zip(votes, correct, strict=True)]))
    out["format_rate"] = float(np.mean([sample.answer is not None for sample in every]))
    out["truncated"] = float(np.mean([sample.truncated for sample in every]))
    out["unresolved"] = float(np.mean([sample.status in unresolved for sample in every]))
    for status in ("nonfinite", "failed"):
        out[status] = float(np.mean([sample.status == status for sample in every]))
    out["mean_tokens"] = float(np.mean([sample.tokens for sample in every]))
    return out
