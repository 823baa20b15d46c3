"""Docstrings follow one form: a summary that opens with a verb, shapes of arrays, no puzzles."""

import ast
import pathlib
import re

import conftest
import pytest

PACKAGE = conftest.ROOT / "copsd_jax"
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))
# Third person singular; add a verb where one is missing.
VERBS = set(
    """
    accumulates adds allocates answers appends applies asks assigns attends averages begins
    blocks broadcasts builds calls casts checks chooses clips closes combines compares compiles
    completes computes concatenates connects converts copies counts creates cuts decides decodes
    describes detects divides downloads draws drops encodes ends ensures escapes estimates
    evaluates executes expands exports extracts fetches fills filters finds finishes fits
    flattens flushes folds formats forms gathers generates gives grades groups guards handles
    hands hashes holds imports inserts iterates joins keeps lets lists loads locates looks
    lowers makes maps marks masks matches measures merges migrates models moves multiplies names
    normalises normalizes opens orders packs pads parses partitions permutes picks places plans
    predicts prepares presents prints processes projects propagates pulls puts quantises
    quantizes raises ranks reads rebuilds receives records reduces refuses rejects releases
    removes renames renders renews repeats replaces replays reports reserves reshapes resolves
    restores restricts retries returns rewrites rotates rounds runs samples saves scales
    scatters scores searches selects sends serializes sets shards shortens shows skips sorts
    spells splits stacks starts states stops stores streams strips submits sums suppresses
    sweeps switches synchronises takes tells tests times tokenizes traces trains transfers
    transforms translates transposes tries truncates turns unpacks updates validates verifies
    visits waits walks warns wraps writes yields zeroes
    """.split()
)
# Openings that leave the reader without a subject.
PUZZLES = re.compile(
    r"^(What|Where|Which|Whether|Who|How|All that|That|Of|As|By|For|From|In|On|To|With|If|Up)\b"
)
ARRAY = re.compile(r"\b(jax\.Array|np\.ndarray)\b")
SHAPE = re.compile(r"\[[^\]]*\]|scalar|shape")


def definitions(tree: ast.Module):
    """Yields (node, whether it is public) of functions and classes, methods included."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            public = not node.name.startswith("_")
            yield node, public
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef):
                        yield inner, public and not inner.name.startswith("_")


def complaints(tree: ast.Module) -> list[str]:
    found = []
    for node, public in definitions(tree):
        text = ast.get_docstring(node)
        if text is None:
            if public and not (node.name.startswith("__") and node.name.endswith("__")):
                found.append(f"{node.lineno} {node.name}: no docstring")
            continue
        summary = text.split("\n\n")[0]
        first = summary.split()[0] if summary.split() else ""
        if not summary.rstrip().endswith((".", "?", ":")):
            found.append(f"{node.lineno} {node.name}: the summary does not end with a period")
        if "\n" in summary:
            found.append(f"{node.lineno} {node.name}: the summary is longer than one line")
        properties = [ast.unparse(d) for d in node.decorator_list]
        if isinstance(node, ast.FunctionDef) and "property" not in properties:
            if first.lower() not in VERBS:
                found.append(f"{node.lineno} {node.name}: opens with {first!r}, not with a verb")
            array = node.returns is not None and ARRAY.search(ast.unparse(node.returns))
            if public and array and not SHAPE.search(text):
                found.append(f"{node.lineno} {node.name}: returns an array without its shape")
        elif PUZZLES.match(summary):
            found.append(f"{node.lineno} {node.name}: opens with {first!r}, not with a noun")
    return found


@pytest.mark.parametrize("file", FILES)
def test_docstrings(file):
    text = pathlib.Path(PACKAGE / file).read_text(encoding="utf-8")
    assert complaints(ast.parse(text)) == []


def test_complaints_are_made():
    """Each rule is seen to fail on a text that breaks it."""
    source = '''
def a() -> jax.Array:
    """Returns hidden states."""
def b():
    """The rows of a step."""
def c():
    """Returns rows"""
def d(): ...
class E:
    """What a step needs."""
def f() -> jax.Array:
    """Returns hidden states [B, L, D]."""
'''
    assert [c.split(": ")[1].split()[0] for c in complaints(ast.parse(source))] == [
        "returns", "opens", "the", "no", "opens",
    ]  # fmt: skip
