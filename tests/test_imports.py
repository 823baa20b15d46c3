"""Data flows one way: a file imports only files above it in DESIGN.md's list."""

import ast
import re

import conftest


def order_in_design() -> list[str]:
    text = (conftest.ROOT / "DESIGN.md").read_text(encoding="utf-8")
    block = text.split("## 3. Layout")[1].split("```")[1].split("copsd_jax/\n")[1]
    names = re.findall(r"^  (\w+)(?:\.py|/)", block, flags=re.MULTILINE)
    assert len(names) == len(set(names))
    return names


def module_of(path) -> str:
    parts = path.relative_to(conftest.ROOT / "copsd_jax").parts
    return parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """First part below copsd_jax of every import, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts[0] == "copsd_jax":
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "copsd_jax" and len(name) > 1}
        assert not (isinstance(node, ast.ImportFrom) and node.level), "no relative imports"
    return found


def test_every_import_points_upwards():
    order = order_in_design()
    files = sorted((conftest.ROOT / "copsd_jax").rglob("*.py"))
    seen = set()
    for path in files:
        name = module_of(path)
        if name == "__init__":
            assert not path.read_text().strip()
            continue
        assert name in order, f"{path} is not in DESIGN.md's list"
        seen.add(name)
        allowed = {*order[: order.index(name)], name}
        extra = imported(ast.parse(path.read_text(encoding="utf-8"))) - allowed
        assert not extra, f"{path} imports {extra}, which stand below it in DESIGN.md"
    assert seen == set(order), f"DESIGN.md lists {set(order) - seen}, which do not exist"


def test_files_and_functions_stay_small():
    for path in (conftest.ROOT / "copsd_jax").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 520, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno
                limit = 120 if path.name == "config.py" and node.name == "default" else 75
                assert lines <= limit, f"{path}: {node.name} has {lines} lines"
