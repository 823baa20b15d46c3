"""Measures how often the graders agree with the public test tables of other graders.

The tables are not part of this project. Clone the repositories, and name the files:

    python benchmarks/grader_agreement.py math-verify=Math-Verify/tests \
        lighteval=lighteval/tests/unit/metrics/test_extractive_match.py \
        nemo=NeMo-Skills/tests/test_math_equal.py golds=math500.jsonl

A table is a `pytest.mark.parametrize` whose rows begin with gold, prediction and (except NeMo's)
the expected verdict; tables with a column `precision` are left out. NeMo's pairs are compared in
both orders. A row of `golds` is a JSON object with `answer`, which must be equal to another
spelling of itself.
"""

import ast
import json
import pathlib
import re
import sys
from typing import Any

from copsd_jax.rewards import extraction, graders

_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")

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


def _read_cell(cell: ast.expr) -> Any:
    if isinstance(cell, ast.BinOp) and isinstance(cell.op, ast.Div):
        return ast.literal_eval(cell.left) / ast.literal_eval(cell.right)
    return ast.literal_eval(cell)


def _read_mark(name: str, mark: Any) -> list[Row]:
    if not isinstance(mark, ast.Call) or len(mark.args) < 2:
        return []
    try:
        table_node: Any = mark.args[1]
        columns = ast.literal_eval(mark.args[0])
        table = [[_read_cell(cell) for cell in row.elts] for row in table_node.elts]
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
    """Finds the answer of a prediction: a marked answer, the last formula, or the whole text."""
    for pattern in ("boxed", "answer_is"):
        answer = extraction.extract_answer(text, pattern, "last_anywhere")
        if answer:
            return answer
    formulas = _FORMULA.findall(text)
    if formulas:
        return next((part for part in formulas[-1] if part), text)
    prose = len(re.findall("[A-Za-z]{3,}", text)) > 1 and "\\" not in text
    numbers = _NUMBER.findall(text) if prose else []
    return numbers[-1] if numbers else text


def read_gold(text: str) -> str:
    """Reads a gold answer; several formulas are a list."""
    parts = [next(part for part in found if part) for found in _FORMULA.findall(text)]
    return ", ".join(parts) if len(parts) > 1 and "\\boxed" not in text else find_answer(text)


def respell(gold: str) -> str:
    """Respells a formula without changing its meaning: other blanks, other fractions, a box."""
    gold = re.sub(r"\s*([-+=,&]|\\\\)\s*", r"\1", gold) if "\\text" not in gold else gold
    gold = gold.replace("\\frac", "\\dfrac").replace("\\ge ", "\\geq ")
    return f"$\\displaystyle {gold}$"


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
                    golds = [json.loads(line)["answer"] for line in lines]
                    rows = [(gold, respell(gold), True) for gold in golds]
                else:
                    rows = read_tables(pathlib.Path(path))
                wrong = []
                for gold, prediction, expected in rows:
                    pair = (gold, prediction)
                    if name != "golds":
                        pair = (read_gold(gold), find_answer(prediction))
                    same, status = grader.compare(*pair)
                    if same != expected:
                        wrong.append((gold, prediction, expected, status))
                print(f"{kind} {name}: {len(rows) - len(wrong)} of {len(rows)}", flush=True)
                for row in wrong if verbose else []:
                    print("   ", *row, sep=" | ")


if __name__ == "__main__":
    main()
