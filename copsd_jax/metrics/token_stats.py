r"""Statistics of tokens and of completions, computed with NumPy on the host.

Token classes show whether a teacher changes content (numbers, words) or style (marks, ends). The
class of every token in the vocabulary is computed once, and looked up in each step. Therefore, the
class of a token does not depend on neighbouring tokens. If a tag is split into several tokens (`<`,
`step`, `_`, `1`, `>`), only the brackets are marks.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

CLASSES = {
    "number": "digits of any script, or a single operator such as + - * / = ^",
    "word": "letters of any script, or a part of a character's bytes",
    "mark": r"special tokens, <think>, </think>, \boxed, braces, brackets of tags",
    "end": "tokens that end a text",
    "other": "white space and punctuation",
}
# Buckets of positions in a completion.
BUCKETS = {
    "0_7": slice(0, 8), "8_31": slice(8, 32), "32_127": slice(32, 128),
    "128_511": slice(128, 512), "512_up": slice(512, None),
}  # fmt: skip

_NAMES = tuple(CLASSES)
_OPERATORS = frozenset("+-*/=^×÷±−·≈≠≤≥√%")
# Angle brackets count as parts of tags, because they are rarer as comparison signs.
_MARK = re.compile(r"\\?boxed[{}]*|</?[a-z_]+>?|[^\w\s=-]*[{}<>][^\w\s=-]*")


def token_class(piece: bytes, *, special: bool = False, end: bool = False) -> str:
    """Returns the key of `CLASSES` for the bytes of one token.

    Bytes that are not valid UTF-8 count as a word. Byte-level tokenizers split the letters of rare
    scripts (Ge'ez, Vai) into incomplete pieces. A single incomplete piece does not show whether the
    character is a letter or an emoji.
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
    # A text without digits is in the class of numbers only if it has exactly one operator, because
    # `**`, `--` and `//` occur in markup, rules and addresses.
    number = "N" in kinds or sum(char in _OPERATORS for char in text) == 1
    return "number" if number else "other"


def classify_vocabulary(
    token_bytes: Sequence[bytes], stop_ids: Collection[int], special_ids: Collection[int]
) -> np.ndarray:
    """Returns an array int8 [V] with the class of each token id, as an index into `CLASSES`.

    Call this function only once per vocabulary.

    Args:
      token_bytes: the bytes of each token, from `tokenizer.list_token_bytes`.
      stop_ids: the ids that get the class `end`, even if they are special.
      special_ids: the ids that get the class `mark`, unless they are stop ids.
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
    """Sums a completion's values by class; returns (sum, count) for each class that occurs.

    Raises:
      ValueError: if the numbers of values and ids differ.
    """
    values_C, ids_C = _aligned(values, ids)
    class_C = table_V[ids_C]
    sums = np.bincount(class_C, weights=values_C, minlength=len(_NAMES))
    counts = np.bincount(class_C, minlength=len(_NAMES))
    parts = zip(_NAMES, sums, counts, strict=True)
    return {name: (float(total), int(count)) for name, total, count in parts if count}


def by_position(
    values: Sequence[float] | np.ndarray, mask: Sequence[bool] | np.ndarray
) -> dict[str, tuple[float, int]]:
    """Sums a completion's values by position; returns (sum, count) for each bucket with values.

    Args:
      values: one value per token of the completion.
      mask: one flag per token; values whose flag is False are left out.
    """
    values_C, mask_C = np.asarray(values, np.float64), np.asarray(mask, bool)
    parts = {name: values_C[places][mask_C[places]] for name, places in BUCKETS.items()}
    return {name: (float(part.sum()), part.size) for name, part in parts.items() if part.size}


def _aligned(
    values: Sequence[float] | np.ndarray, ids: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if len(values) != len(ids):
        raise ValueError(f"there are {len(values)} values for {len(ids)} tokens")
    return np.asarray(values, np.float64), np.asarray(ids, np.int64)


# ---- texts -----------------------------------------------------------------------------------


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Returns the share of a completion's n-grams that repeat an earlier n-gram.

    The share is 1 - (distinct n-grams) / (all n-grams). With n = 4, the share equals the repetition
    rate that papers report. The share is 0 for a completion of fewer than n tokens.
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


# Scripts that are written without spaces between words; each of their characters counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def _split_metric_words(text: str) -> list[str]:
    """Splits a text into case-folded words of letters, marks and numbers."""
    text = unicodedata.normalize("NFC", text).casefold()
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return _WORD.findall("".join(kept))


def overlap(completion: str, privileged: str, n: int = 3) -> float:
    """Returns the share of the completion's word n-grams that the privileged text contains.

    The share is 1 if the completion is a copy of the privileged text, and 0 if the completion has
    fewer than n words. If n is below 3, any two texts about the same problem have n-grams in
    common. If n is above 3, a copy with a few changed words is not detected. Both texts may repeat
    n-grams of the problem, so compare the share in a step with the shares in other steps, not with
    0.
    """
    theirs, ours = _split_metric_words(privileged), _split_metric_words(completion)
    known = {tuple(theirs[i : i + n]) for i in range(len(theirs) - n + 1)}
    grams = [tuple(ours[i : i + n]) for i in range(len(ours) - n + 1)]
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def advantage_by_step(
    advantage_C: Sequence[float], ranges: Sequence[tuple[int, int]]
) -> list[float | None]:
    """Averages A_t = ln q - ln p over each step's tokens [start, stop); an empty step gives None.

    A plot of the averages over the steps corresponds to the plot in the paper on
    critique-conditioned self-distillation (arXiv 2606.11173). With a reference solution as the
    context, A_t is negative nearly everywhere. With a critique as the context, A_t is negative only
    from the wrong step on.

    Raises:
      ValueError: if a range lies outside the completion.
    """
    values_C = np.asarray(advantage_C, np.float64)
    means = []
    for start, stop in ranges:
        if not 0 <= start <= stop <= len(values_C):
            raise ValueError(f"range {start}:{stop} is not within the {len(values_C)} tokens")
        means.append(float(values_C[start:stop].mean()) if stop > start else None)
    return means


# ---- records ---------------------------------------------------------------------------------


def summary(records: Sequence[Mapping[str, Any]], table_V: np.ndarray) -> dict[str, float]:
    """Returns the metrics of one step by name, averaged over the step's rollout records.

    Args:
      records: the rollout records of a step. A record has `completion_ids`, and may have the lists
        `divergence`, `loss_mask`, `logp_student` and `logp_teacher` (nats), each with one entry per
        completion token. A record with `divergence` also has `loss_mask`. The metric `overlap` is
        computed from `completion` and `privileged_text`.
      table_V: the class of each id, from `classify_vocabulary`.

    Returns:
      The metrics. `divergence_CLASS` is the mean divergence of the loss-carrying tokens of a class.
      `divergence_at_0_7` is the mean divergence of the loss-carrying tokens at positions 0 to 7;
      each other bucket has a metric of this form. `advantage` and `advantage_CLASS` are
      means over all tokens of the completions that a teacher scored.
      `advantage_negative` is the share of all teacher-scored tokens that have an advantage below 0.
      The advantage metrics include tokens that carry no loss, because correct steps also show the
      effect of a context. `repetition` and `overlap` are means over completions. A metric skips
      each record in which a needed field is absent, or is empty because there was no teacher. If no
      record has the needed fields, the metric is absent.

    Raises:
      ValueError: if a list and its completion differ in length.
    """
    sums: dict[str, tuple[float, int]] = {}
    for record in records:
        for name, total, count in _sum_record(record, table_V):
            old = sums.get(name, (0.0, 0))
            sums[name] = (old[0] + total, old[1] + count)
    return {name: total / count for name, (total, count) in sums.items()}


def _sum_record(record: Mapping[str, Any], table_V: np.ndarray) -> Iterator[tuple[str, float, int]]:
    """Yields (name, sum of the values, number of values) for each metric that a record has."""
    ids = record["completion_ids"]
    yield "repetition", repetition(ids), 1
    if record.get("privileged_text"):
        yield "overlap", overlap(record["completion"], record["privileged_text"]), 1
    if record.get("divergence"):
        value_C, ids_C = _aligned(record["divergence"], ids)
        loss_C = _aligned(record["loss_mask"], ids)[0] != 0
        for kind, part in by_class(value_C[loss_C], ids_C[loss_C], table_V).items():
            yield f"divergence_{kind}", *part
        for bucket, part in by_position(value_C, loss_C).items():
            yield f"divergence_at_{bucket}", *part
    if record.get("logp_teacher") and record.get("logp_student"):
        student_C, _ = _aligned(record["logp_student"], ids)
        advantage_C = _aligned(record["logp_teacher"], ids)[0] - student_C
        yield "advantage", float(advantage_C.sum()), len(ids)
        yield "advantage_negative", float((advantage_C < 0).sum()), len(ids)
        for kind, part in by_class(advantage_C, ids, table_V).items():
            yield f"advantage_{kind}", *part
