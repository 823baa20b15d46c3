"""The row: one problem in one language."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem in one language.

    Attributes:
      id: unique among the rows of a source and the languages asked for.
      problem: the problem's text in `lang`.
      solution: the reference solution (English in COPSD's data), "" where a source has none.
      answer: the final answer, "" where a source has none.
      lang: the code of the problem's language, as languages.json writes it.
      problem_en: the English problem, "" where a source has none.
      group: any label by which scores are reported apart, or ""; of bundled rows, the wording.
    """

    id: str
    problem: str
    solution: str
    answer: str
    lang: str
    problem_en: str
    group: str = ""


def compute_fingerprint(rows: Sequence[Row]) -> str:
    """Computes SHA-256 of the rows and their order, which tells whether two runs had equal data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dataclasses.astuple(row)).encode())
    return digest.hexdigest()
