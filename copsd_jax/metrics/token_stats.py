r"""What kind of token carries the divergence, and what completions look like: NumPy on the host.

Classes tell whether a teacher moves content (numbers, words) or style (marks, ends). They are a
table per vocabulary, so that a step costs a lookup; so a token's class does not depend on its
neighbours, and of a tag spelled in several tokens (`<`, `step`, `_`, `1`, `>`) only the brackets
are marks.
"""

import itertools
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

CLASSES = {
    "number": "digits of any script, and one operator such as + - * / = ^",
    "word": "letters of any script, or some bytes of a character",
    "mark": r"special tokens, <think>, </think>, \boxed, braces, brackets of tags",
    "end": "what ends a text",
    "other": "white space and punctuation",
}
EDGES = (0, 8, 32, 128, 512)  # where buckets of positions start
BUCKETS = ("0_7", "8_31", "32_127", "128_511", "512_up")  # their names

_NAMES = tuple(CLASSES)
_OPERATORS = frozenset("+-*/=^×÷±−·≈≠≤≥√%")
# Angle brackets are of tags: few completions compare, and many are written in tags.
_MARK = re.compile(r"\\?boxed[{}]*|</?[a-z_]+>?|[^\w\s=-]*[{}<>][^\w\s=-]*")


def token_class(piece: bytes, *, special: bool = False, end: bool = False) -> str:
    """A key of `CLASSES` for the bytes of one token.

    A piece that is no whole UTF-8 is a word: byte-level tokenizers cut the letters of scripts they
    saw little of (Ge'ez, Vai), and no single piece tells a letter from an emoji.
    """
    if end or special:
        return "end" if end else "mark"
    try:
        text = piece.decode("utf-8").strip()
    except UnicodeDecodeError:
        return "word"
    if _MARK.fullmatch(text):
        return "mark"
    kinds = {unicodedata.category(char)[0] for char in text}
    if kinds & {"L", "M"}:
        return "word"
    # One operator: `**`, `--` and `//` are markup, rules and addresses.
    number = "N" in kinds or sum(char in _OPERATORS for char in text) == 1
    return "number" if number else "other"


def classes(
    token_bytes: Sequence[bytes], stop_ids: Collection[int], special_ids: Collection[int]
) -> np.ndarray:
    """int8 [V]: for each id the place of its class in `CLASSES`; once a vocabulary.

    Args:
      token_bytes: of `tokenizer.list_token_bytes`.
      stop_ids: end, whether special or not.
    """
    stops, specials = set(stop_ids), set(special_ids)
    found = (
        token_class(piece, special=i in specials, end=i in stops)
        for i, piece in enumerate(token_bytes)
    )
    return np.fromiter((_NAMES.index(name) for name in found), np.int8, len(token_bytes))


def by_class(
    values: Sequence[float] | np.ndarray, ids: Sequence[int] | np.ndarray, table_V: np.ndarray
) -> dict[str, tuple[float, int]]:
    """(sum, count) of a completion's values by class; only classes that occur.

    Raises:
      ValueError: unless there is one value per id.
    """
    values_C, ids_C = _aligned(values, ids)
    class_C = table_V[ids_C]
    sums = np.bincount(class_C, weights=values_C, minlength=len(_NAMES))
    counts = np.bincount(class_C, minlength=len(_NAMES))
    return {
        name: (float(total), int(count))
        for name, total, count in zip(_NAMES, sums, counts, strict=True)
        if count
    }


def by_position(
    values: Sequence[float] | np.ndarray,
    edges: Sequence[int] = EDGES,
    mask: Sequence[bool] | np.ndarray | None = None,
) -> dict[str, tuple[float, int]]:
    """(sum, count) of a completion's values by bucket: `0_7`, `8_31` … `512_up`; no empty ones.

    Args:
      mask: the values that count, at the positions that they have; None for all.

    Raises:
      ValueError: unless edges rise from 0.
    """
    if not edges or edges[0] or any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"edges are {tuple(edges)}: they rise from 0")
    ends = [*edges[1:], None]
    kept = np.ones(len(values), bool) if mask is None else np.asarray(mask, bool)
    out = {}
    for start, end in zip(edges, ends, strict=True):
        part = np.asarray(values, np.float64)[start:end][kept[start:end]]
        if part.size:
            name = f"{start}_up" if end is None else f"{start}_{end - 1}"
            out[name] = (float(part.sum()), int(part.size))
    return out


def _aligned(
    values: Sequence[float] | np.ndarray, ids: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if len(values) != len(ids):
        raise ValueError(f"{len(values)} values do not belong to {len(ids)} tokens")
    return np.asarray(values, np.float64), np.asarray(ids, np.int64)


# ---- texts -----------------------------------------------------------------------------------


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a completion's n-grams that occurred in it before; 0 of fewer than n tokens.

    1 - distinct / all, as in the papers' repetition rate with n = 4.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


# Scripts written without blanks between words: each character is taken for a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def _words(text: str) -> list[str]:
    """Letters, marks and numbers between all else, without case."""
    text = unicodedata.normalize("NFC", text).casefold()
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return _WORD.findall("".join(kept))


def overlap(completion: str, privileged: str, n: int = 3) -> float:
    """Share of the completion's word n-grams that the privileged text has; 0 of fewer words.

    n = 3: any two texts about one problem share its words and pairs of them, while longer n-grams
    miss a copy with a word changed here and there. 1 is a copy; what two texts share because both
    repeat the problem is in it, so that it is compared between steps rather than with 0.
    """
    theirs, ours = _words(privileged), _words(completion)
    known = {tuple(theirs[i : i + n]) for i in range(len(theirs) - n + 1)}
    grams = [tuple(ours[i : i + n]) for i in range(len(ours) - n + 1)]
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def advantage_by_step(
    advantage_C: Sequence[float], ranges: Sequence[tuple[int, int]]
) -> list[float | None]:
    """Mean of A_t = ln q - ln p over each step's tokens [start, stop); None for an empty step.

    The figure of critique-conditioned self-distillation (arXiv 2606.11173): a reference solution
    as context makes A_t negative nearly everywhere, a critique only at and after the wrong step.

    Raises:
      ValueError: for a range outside the completion.
    """
    values_C = np.asarray(advantage_C, np.float64)
    means = []
    for start, stop in ranges:
        if not 0 <= start <= stop <= len(values_C):
            raise ValueError(f"a step has tokens {start} to {stop} of {len(values_C)}")
        means.append(float(values_C[start:stop].mean()) if stop > start else None)
    return means


# ---- records ---------------------------------------------------------------------------------


class _Means:
    """Means by name, over all tokens or completions that have a value."""

    def __init__(self):
        self._parts: dict[str, tuple[float, int]] = {}

    def add(self, name: str, total: float, count: int) -> None:
        if count:
            old = self._parts.get(name, (0.0, 0))
            self._parts[name] = (old[0] + total, old[1] + count)

    def values(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._parts.items()}


def summary(
    records: Sequence[Mapping[str, Any]], table_V: np.ndarray, n: int = 4
) -> dict[str, float]:
    """Flat metrics of a step's rollout records, each the mean over the step's tokens.

    Args:
      records: with `completion_ids`, and where the method has them, lists aligned to these:
        `divergence` with `loss_mask`, `logp_student`, `logp_teacher` (nats); with `completion` and
        `privileged_text` for the overlap.
      table_V: of `classes`.
      n: of the repetition.

    Returns:
      `divergence_CLASS`, `divergence_at_0_7` …: over the tokens with loss, as the step's
      `divergence`, whose parts they are. `advantage`, `advantage_CLASS`, `advantage_negative`
      (share of tokens below 0): over all tokens of the completions that a teacher scored, with
      loss or without, since what a context says of the right steps is seen there. As means over
      completions `repetition`, `overlap`. What no record has is left out: a record without a
      field, or with an empty list because it has no teacher, counts nowhere in it.

    Raises:
      ValueError: for a list of another length than its completion.
    """
    means = _Means()
    for record in records:
        ids = record["completion_ids"]
        means.add("repetition", repetition(ids, n), 1)
        if record.get("privileged_text"):
            means.add("overlap", overlap(record["completion"], record["privileged_text"]), 1)
        if record.get("divergence"):
            _add_divergence(means, record, table_V)
        if record.get("logp_teacher") and record.get("logp_student"):
            student_C, _ = _aligned(record["logp_student"], ids)
            advantage_C = _aligned(record["logp_teacher"], ids)[0] - student_C
            means.add("advantage", float(advantage_C.sum()), len(ids))
            means.add("advantage_negative", float((advantage_C < 0).sum()), len(ids))
            _add_classes(means, "advantage", advantage_C, ids, table_V)
    return means.values()


def _add_divergence(means: _Means, record: Mapping[str, Any], table_V: np.ndarray) -> None:
    """The tokens with loss, by class and by position in the completion."""
    value_C, ids_C = _aligned(record["divergence"], record["completion_ids"])
    loss_C = _aligned(record["loss_mask"], record["completion_ids"])[0] != 0
    _add_classes(means, "divergence", value_C[loss_C], ids_C[loss_C], table_V)
    for bucket, part in by_position(value_C, mask=loss_C).items():
        means.add(f"divergence_at_{bucket}", *part)


def _add_classes(means: _Means, name: str, values, ids, table_V: np.ndarray) -> None:
    for kind, part in by_class(values, ids, table_V).items():
        means.add(f"{name}_{kind}", *part)
