"""The row: one problem in one language, as every part of a run sees it."""

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
      group: any label by which scores are reported apart (bundled rows: the wording's), or "".
    """

    id: str
    problem: str
    solution: str
    answer: str
    lang: str
    problem_en: str
    group: str = ""


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows and their order, to tell whether two runs saw the same data."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(dataclasses.astuple(row)).encode())
    return digest.hexdigest()
