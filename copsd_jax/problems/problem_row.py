"""The row: one problem in one language."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem in one language.

    Attributes:
      id: the row's id, which no other row of the same source has.
      problem: the problem's text in `lang`.
      solution: the reference solution (English in COPSD's data), or "" if the source has none.
      answer: the final answer, or "" if the source has none.
      lang: the code of the problem's language, as in languages.json.
      problem_en: the English problem, or "" if the source has none.
      group: a label, or "" for none; scores are reported separately for each label. In bundled
        rows, the label is the wording of the problem.
    """

    id: str
    problem: str
    solution: str
    answer: str
    lang: str
    problem_en: str
    group: str = ""


def compute_fingerprint(rows: Sequence[Row]) -> str:
    """Hashes the rows, in order, by SHA-256; equal hashes show that two runs had equal data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dataclasses.astuple(row)).encode())
    return digest.hexdigest()
