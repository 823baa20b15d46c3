"""Imports point one way: between folders as their `__init__.py` say, between files in no circle."""

import ast
import collections
import pathlib
import re

import conftest

PACKAGE = conftest.ROOT / "copsd_jax"
# Files of the package itself may import every folder, and of one another these.
COMMANDS = {
    "main": {"train"},
    "train": {"evaluation", "self_test", "summary"},
    "self_test": set(),
    "summary": set(),
    "evaluate": {"evaluation"},
    "evaluation": set(),
    "export": {"model_card"},
    "model_card": set(),
    "replay": set(),
    "token_comparison": set(),
    "api": {"token_comparison"},
    "command": {"main"},  # and, by their names, the other programs
    "new_card": set(),
}


def module_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: pathlib.Path, files: set[str]) -> set[str]:
    """The files and folders of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            first, _, rest = (node.module or "").partition(".")
            if first == "copsd_jax":
                names = [".".join(filter(None, (rest, alias.name))) for alias in node.names]
                found |= {name if name in files else rest for name in names}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.removeprefix("copsd_jax.") for n in names if n.startswith("copsd_jax.")}
    return found


def graph() -> dict[str, set[str]]:
    paths = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    paths.pop("__init__")
    return {name: imported(path, set(paths)) for name, path in paths.items()}


def allowed(folder: str) -> set[str]:
    """What `May import:` of a folder's docstring names."""
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    found = re.search(r"May import: (.*?)\.$", text, flags=re.DOTALL | re.MULTILINE)
    assert found, f"{folder}/__init__.py has no line 'May import: ...'"
    return set(re.findall(r"[a-z]+", found.group(1).split("nothing")[0]))


def test_folders_import_what_they_may():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    used: dict[str, set[str]] = {folder: set() for folder in folders}
    for name, others in graph().items():
        folder = name.split(".")[0]
        for other in others:
            target = other.split(".")[0]
            if folder in folders:
                assert target in folders, f"{name} imports {other}, a command"
                used[folder] |= {target} - {folder}
                wrong = target != folder and target not in allowed(folder)
                assert not wrong, (
                    f"{name} imports {other}, which {folder}/__init__.py does not list"
                )
            else:
                assert target in folders | COMMANDS[name], f"{name} imports {other}"
    for folder in folders:
        unused = allowed(folder) - used[folder]
        assert not unused, f"{folder}/__init__.py lists {unused}, which nothing there imports"


def test_no_files_import_each_other_in_a_circle():
    edges, done = graph(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    assert done >= set(edges)


def test_settings_are_read_without_jax():
    """A wrong setting is refused before JAX starts: `config` and `main` import neither."""
    import subprocess
    import sys

    code = (
        "import sys; import copsd_jax.main; from copsd_jax import config; config.default();"
        "print({'jax', 'transformers', 'flax', 'optax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def code_lines(text: str) -> set[int]:
    """The numbers of the lines that are neither blank nor of a comment or docstring."""
    lines = text.splitlines()
    code = {n for n, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            code -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return code


def test_folders_files_and_functions_stay_small():
    folders: collections.Counter[str] = collections.Counter()
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        code = code_lines(text)
        assert len(code) <= 350, path
        folders[path.relative_to(PACKAGE).parts[0]] += len(code)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = code & set(range(node.lineno, (node.end_lineno or 0) + 1))
                assert len(lines) <= 60, f"{path}: {node.name} has {len(lines)} lines of code"
    assert max(folders.values()) <= 2000, folders
