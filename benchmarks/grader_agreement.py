"""Measures how often the graders agree with the public test tables of other graders.

The tables are not part of this project. Clone the repositories, and name the files:

    python benchmarks/grader_agreement.py math-verify=Math-Verify/tests \
        lighteval=lighteval/tests/unit/metrics/test_extractive_match.py \
        nemo=NeMo-Skills/tests/test_math_equal.py golds=math500.jsonl

A table is a `pytest.mark.parametrize` whose rows begin with gold, prediction and (except NeMo's)
the expected verdict; tables with a column `precision` are left out. NeMo's pairs are compared in
both orders. A row of `golds` is a JSON object with `answer`, which must be equal to itself.
"""

import ast
import json
import pathlib
import sys

from copsd_jax.rewards import extraction, graders

Row = tuple[str, str, bool]


def read_tables(path: pathlib.Path) -> list[Row]:
    """Reads the rows of all parametrized tests below a path."""
    rows = []
    for file in sorted(path.glob("test_*.py")) if path.is_dir() else [path]:
        for function in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef):
                for mark in function.decorator_list:
                    rows += _read_mark(function.name, mark)
    return rows


def _read_mark(name: str, mark: ast.expr) -> list[Row]:
    if not isinstance(mark, ast.Call) or len(mark.args) < 2:
        return []
    try:
        columns, table = (ast.literal_eval(argument) for argument in mark.args[:2])
    except ValueError:  # a row that is not written out
        return []
    columns = [column.strip() for column in columns.split(",")]
    if columns == ["output_pair"]:
        expected = "incorrect" not in name
        pairs = [(str(a), str(b)) for a, b in table if a is not None and b is not None]
        return [(*pair, expected) for a, b in pairs for pair in ((a, b), (b, a))]
    verdict = "expected" if "expected" in columns else "result"
    if "precision" in columns or "abc" in name or columns[:2] != ["gold", "pred"]:
        return []
    at = columns.index(verdict) if verdict in columns else None
    return [] if at is None else [(row[0], row[1], bool(row[at])) for row in table]


def find_answer(text: str) -> str:
    """Finds the answer of a prediction; a text without a marked answer is the answer."""
    for pattern in ("boxed", "answer_is"):
        answer = extraction.extract_answer(text, pattern, "last_anywhere")
        if answer:
            return answer
    return text


def main() -> None:
    """Prints one line for each table and kind of grader, and the rows that disagree."""
    verbose = "--rows" in sys.argv
    for kind in graders.GRADERS:
        with graders.Grader("boxed", "last_anywhere", 20.0, kind) as grader:
            for argument in sys.argv[1:]:
                name, _, path = argument.partition("=")
                if not path:
                    continue
                if name == "golds":
                    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
                    rows = [(a, f" {a} ", True) for a in (json.loads(x)["answer"] for x in lines)]
                else:
                    rows = read_tables(pathlib.Path(path))
                wrong = []
                for gold, prediction, expected in rows:
                    same, status = grader.compare(find_answer(gold), find_answer(prediction))
                    if same != expected:
                        wrong.append((gold, prediction, expected, status))
                print(f"{kind} {name}: {len(rows) - len(wrong)} of {len(rows)}", flush=True)
                for row in wrong if verbose else []:
                    print("   ", *row, sep=" | ")


if __name__ == "__main__":
    main()
