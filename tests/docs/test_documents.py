"""Documents name only files, modules, settings and targets that exist, in lines that fit."""

import ast
import importlib.util
import json
import re

import conftest
import pytest

from copsd_jax.config import settings
from copsd_jax.dryrun import targets
from copsd_jax.problems import bundled

ROOT = conftest.ROOT
GENERATED = {"api", "generated"}
TOP = [ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [
    path
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if not GENERATED & set(path.relative_to(ROOT / "docs").parts)
]
DOCUMENTS = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in TOP + PAGES]
# The changelog says what earlier versions had.
CURRENT = [document for document in DOCUMENTS if "CHANGELOG" not in str(document.id)]

SETTINGS = settings.flat(settings.default())
SECTIONS = {name.split(".")[0] for name in SETTINGS if "." in name}
SUFFIXES = "py md sh txt yaml ipynb json toml jsonl svg".split()
# Folders that a name in a document may start from.
BASES = ("", "copsd_jax", "copsd_jax/problems", "benchmarks/results", "docs", "tests")
# Files of a user or of a run.
FOREIGN = re.compile(
    r"^(W|D|out|build|FILE|/mnt|\.\.|test\.jsonl|problems\.jsonl|adapter_|step_NNNNNN)"
)


def code(text: str) -> list[str]:
    """Inline code of a text, without its blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@pytest.mark.parametrize("path", DOCUMENTS)
def test_lines_fit(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    long = [f"{path.name}:{i}" for i, line in enumerate(lines, start=1) if len(line) > 120]
    assert not long


@pytest.mark.parametrize(("name", "most"), [("README.md", 120), ("DESIGN.md", 200)])
def test_length(name, most):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most


@pytest.mark.parametrize("path", DOCUMENTS)
def test_relative_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    links += re.findall(r"```\{(?:image|include)\} (\S+)", text)
    for link in links:
        if not link.startswith(("http", "#")):
            target = path.parent / link.partition("#")[0]
            built = GENERATED & set(target.relative_to(path.parent).parts)
            assert built or target.exists(), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", CURRENT)
def test_files_in_backticks_exist(path):
    for name in code(path.read_text(encoding="utf-8")):
        name = name.removeprefix("--config=").partition(":")[0]
        is_file = re.fullmatch(rf"[\w./-]+\.({'|'.join(SUFFIXES)})", name)
        is_folder = re.fullmatch(r"([\w.-]+/)+", name)
        if (is_file or is_folder) and not FOREIGN.match(name) and "NAME" not in name:
            found = [base for base in BASES if (ROOT / base / name).exists()]
            assert found, f"{path.name} names {name}"


@pytest.mark.parametrize("path", CURRENT)
def test_names_said_to_be_in_a_file_are_there(path):
    """As in: `CONTEXTS` in `copsd_jax/teaching/contexts.py`."""
    text = path.read_text(encoding="utf-8")
    for name, file in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", text):
        file = next(ROOT / base / file for base in BASES if (ROOT / base / file).is_file())
        found = re.search(rf"^(class |def )?{name}\b", file.read_text(encoding="utf-8"), flags=re.M)
        assert found, f"{path.name} says that {name} is in {file}"


def exists(name: str) -> bool:
    """Whether `copsd_jax.folder.module.name`, or a beginning of it, is in the package's files."""
    parts = name.split(".")
    file = ROOT / parts[0]
    while file.is_dir() and len(parts) > 1 and (file / parts[1]).is_dir():
        file, parts = file / parts[1], parts[1:]
    if len(parts) == 1:
        return True
    module = file / f"{parts[1]}.py"
    rest = parts[2:] if module.is_file() else parts[1:]
    module = module if module.is_file() else file / "__init__.py"
    if not rest:
        return True
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        names = [getattr(node, "name", None)]
        names += [getattr(t, "id", None) for t in getattr(node, "targets", [])]
        names += [getattr(getattr(node, "target", None), "id", None)]
        names += [a.asname or a.name for a in getattr(node, "names", [])]
        if rest[0] in names:
            return True
    return False


@pytest.mark.parametrize("path", CURRENT)
def test_modules_and_settings_in_backticks_exist(path):
    """`copsd_jax.a.b`, `section.setting`, `section.setting=value` and `section.*`."""
    for text in code(path.read_text(encoding="utf-8")):
        for word in text.replace("--config.", "").split():
            name = word.partition("=")[0].rstrip(",")
            if re.fullmatch(r"copsd_jax(\.\w+)+", name):
                assert exists(name), f"{path.name} names {name}"
            first, _, rest = name.partition(".")
            if re.fullmatch(r"\w+\.\w+", name) and first in SECTIONS and rest not in SUFFIXES:
                assert name in SETTINGS, f"{path.name} names the setting {name}"
            if re.fullmatch(r"\w+\.\*", name):
                assert first in SECTIONS, f"{path.name} names the settings {name}"


def programs() -> list:
    """The Python of the documents and of the notebook."""
    out = []
    for path in TOP + PAGES:
        blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.M | re.S)
        if blocks:
            out.append(pytest.param("\n".join(blocks), id=path.name))
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    lines = "\n".join(cells).split("\n")
    code = "\n".join(line.replace("!{", "pass  # {") for line in lines)
    return [*out, pytest.param(code, id="quickstart.ipynb")]


@pytest.mark.parametrize("code", programs())
def test_names_in_programs_exist(code):
    """`module.name` of each module of the package that a program imports, and what it imports."""
    tree, modules = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("copsd_jax"):
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    assert modules
    for name in modules.values():
        assert exists(name), name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id, "")
            if module and (ROOT / f"{module.replace('.', '/')}.py").is_file():
                assert exists(f"{module}.{node.attr}"), f"{module}.{node.attr}"


def test_a_name_that_does_not_exist_is_found():
    assert exists("copsd_jax.losses.divergence_loss.divergence")
    assert not exists("copsd_jax.losses.divergence_loss.nothing")
    assert not exists("copsd_jax.losses.nothing")
    assert not exists("copsd_jax.nothing.divergence")


@pytest.mark.parametrize("path", CURRENT)
def test_settings_of_commands_exist(path):
    for name in re.findall(r"--config\.([\w.]+)", path.read_text(encoding="utf-8")):
        assert name in SETTINGS, f"{path.name} sets {name}"


@pytest.mark.parametrize("path", CURRENT)
def test_cards_and_presets_exist(path):
    text = path.read_text(encoding="utf-8")
    for card, preset in re.findall(r"configs/(\w+)\.py(?::(\w+))?", text):
        if card == "NAME":
            continue
        file = ROOT / "configs" / f"{card}.py"
        assert file.is_file(), f"{path.name} names {file.name}"
        if preset:
            spec = importlib.util.spec_from_file_location(card, file)
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            assert module.get_config(preset)


@pytest.mark.parametrize("path", CURRENT)
def test_make_targets_exist(path):
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = re.findall(r"`(?:\w+=\S+ )?make ([\w-]+)", text)
    named += re.findall(r"^(?:\w+=\S+ )?make ([\w-]+)", text, flags=re.M)
    for target in named:
        assert target in targets, f"{path.name} says make {target}"


@pytest.mark.parametrize("path", CURRENT)
def test_targets_of_dry_runs_are_known(path):
    for target in re.findall(r"--dry_run=([\w:*-]+)", path.read_text(encoding="utf-8")):
        assert targets.parse_target(target)


def imports_in_design() -> dict[str, set[str]]:
    """Of each folder of the tree in DESIGN.md, the folders that it may import."""
    text = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    tree = text.split("```\ncopsd_jax/")[1].split("\nconfigs/")[0].split("\n")
    column = tree[0].index("may import") + len("copsd_jax/") - len("copsd_jax/")
    out: dict[str, set[str]] = {}
    folder = ""
    for line in tree[1:]:
        match = re.match(r"  (\w+)/ ", line)
        folder = match[1] if match else folder if line.startswith(" " * 10) else ""
        if folder:
            offset = column + len("copsd_jax/")
            out.setdefault(folder, set()).update(re.findall(r"\w+", line[offset:]))
    return out


def test_the_bundled_files_are_listed_with_their_sizes():
    text = (ROOT / "docs/data.md").read_text()
    (item,) = re.findall(r"^- `bundled:(?:.|\n  )*", text, flags=re.M)
    names = re.findall(r"`bundled:(\w+)`", item.partition(": ")[0])
    assert tuple(names) == bundled.NAMES
    sizes = [len(bundled.find_file(name).read_text().splitlines()) for name in names]
    assert re.findall(r"\d+", item) == [str(size) for size in sizes]


def test_the_tree_of_design_is_that_of_the_package():
    stated = imports_in_design()
    folders = [path.parent for path in (ROOT / "copsd_jax").glob("*/__init__.py")]
    assert set(stated) == {folder.name for folder in folders}
    for folder in folders:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        line = re.search(r"May import: (.*?)\.$", text, flags=re.DOTALL | re.MULTILINE)
        assert line, folder
        allowed = set(re.findall(r"[a-z]+", line[1].split("nothing")[0]))
        if stated[folder.name] == {"all", "above"}:
            above = list(stated)[: list(stated).index(folder.name)]
            assert allowed <= set(above)
        else:
            assert stated[folder.name] == allowed, folder.name


def convert(text: str) -> str:
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return "\n".join(module.convert(text.split("\n")))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Returns `x_BC`.", "Returns ``x_BC``."),
        ("Sums *all* of `x`s | y_.", r"Sums \*all\* of ``x``\ s \| y\_."),
        ("A row:\n\n    a b\n\nthen.", "A row:\n\n::\n\n        a b\n\nthen."),
        ("Two:\n- a\n- b", "Two:\n\n- a\n- b"),
        ("Args:\n  x: a `y`.", "Args:\n  x: a ``y``."),
    ],
)
def test_docstrings_become_restructured_text(text, wanted):
    assert convert(text) == wanted
