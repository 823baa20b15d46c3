"""Draws random lines of code or sentences, with which a reader judges names and English.

    python tools/draw.py lines --seed=1 [--count=40]       # with the head of their function
    python tools/draw.py lines --seed=1 --answers          # the folders of the same lines
    python tools/draw.py sentences --seed=1 [--count=300]  # sentences of code and documents

A reader of `lines` has README, DESIGN and the names in the tree, and guesses the folder of each
line. A reader of `sentences` says for each sentence whether it had to be read twice.
"""

import argparse
import ast
import io
import pathlib
import random
import re
import sys
import tokenize

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "copsd_jax"
DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "docs/**/*.md")


def folder_of(path: pathlib.Path) -> str:
    """Returns the path's first folder in the package, or its file name if it is in none."""
    return path.relative_to(PACKAGE).parts[0]


def _head(top: ast.FunctionDef | ast.ClassDef) -> str:
    """Returns the first line of a definition as one line: a function's with its arguments."""
    if isinstance(top, ast.ClassDef):
        return f"class {top.name}"
    returned = f" -> {ast.unparse(top.returns)}" if top.returns else ""
    return f"def {top.name}({ast.unparse(top.args)}){returned}"


def statements() -> list[tuple[str, str, str]]:
    """Returns (folder, head of the definition, text) of every informative statement.

    A statement is informative if it is in a function or class, and has at least three names of at
    least four letters. Functions called `main` are left out, because their name names no place.
    """
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for top in ast.parse(text).body:
            if not isinstance(top, ast.FunctionDef | ast.ClassDef) or top.name == "main":
                continue
            for node in ast.walk(top):
                if not isinstance(node, ast.stmt) or hasattr(node, "body"):
                    continue
                source = " ".join((ast.get_source_segment(text, node) or "").split())
                names = set(re.findall(r"[A-Za-z_]{4,}", source))
                if len(names) >= 3 and not isinstance(getattr(node, "value", None), ast.Constant):
                    found.append((folder_of(path), _head(top), source[:300]))
    return found


def _paragraphs(text: str) -> list[str]:
    """Returns the paragraphs of prose in a text, without code blocks, tables and drawings."""
    text = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    blocks = re.split(r"\n\s*\n", text)
    kept = []
    for block in blocks:
        lines = [
            line for line in block.split("\n") if not line.lstrip().startswith(("|", "#", "<"))
        ]
        if lines and not all(line.startswith("    ") for line in lines):
            kept.append(" ".join(" ".join(lines).split()))
    return kept


def _prose_of_code(path: pathlib.Path) -> list[str]:
    """Returns a file's docstrings, comments, and messages of raised errors."""
    text, out = path.read_text(encoding="utf-8"), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            out += _paragraphs(ast.get_docstring(node) or "")
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = ast.unparse(node.exc.args[0])
            out.append(re.sub(r"^f?['\"]|['\"]$", "", message))
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line = token.string.lstrip("# ").strip()
            own = token.line.lstrip().startswith("#")
            if own and comments and comments[-1][0] == token.start[0] - 1:
                comments[-1] = (token.start[0], f"{comments[-1][1]} {line}")
            else:
                comments.append((token.start[0] if own else -1, line))
    return out + [c for _, c in comments if not c.startswith(("fmt:", "noqa", "pyright", "---"))]


def sentences() -> list[str]:
    """Returns every sentence of at least four words, each preceded by its file in brackets."""
    found = []
    files = [path for path in sorted(PACKAGE.rglob("*.py"))]
    for path in files:
        found += [(path, text) for text in _prose_of_code(path)]
    for pattern in DOCUMENTS:
        for path in sorted(ROOT.glob(pattern)):
            found += [(path, t) for t in _paragraphs(path.read_text(encoding="utf-8"))]
    out = []
    for path, text in found:
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text):
            if len(sentence.split()) >= 4:
                out.append(f"[{path.relative_to(ROOT)}] {sentence}")
    return out


def main(argv: list[str]) -> int:
    """Prints a draw; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kind", choices=("lines", "sentences"))
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--answers", action="store_true")
    args = parser.parse_args(argv)
    random_numbers = random.Random(args.seed)
    if args.kind == "sentences":
        for k, sentence in enumerate(random_numbers.sample(sentences(), args.count or 300), 1):
            print(f"{k}. {sentence}")
        return 0
    for k, (folder, inside, line) in enumerate(
        random_numbers.sample(statements(), args.count or 40), 1
    ):
        print(f"{k}. {folder if args.answers else inside + ':  ' + line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
