"""Writes the pages that follow from the package: one of the settings, one per folder of modules."""

import ast
import pathlib
import re

from copsd_jax.config import settings
from copsd_jax.training import table_rules

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "copsd_jax"


def write(docs: pathlib.Path) -> None:
    """Writes `api/*.md` and `generated/settings.md` below the folder of the documents."""
    api = docs / "api"
    api.mkdir(exist_ok=True)
    folders = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
    pages = {folder.name: _folder_page(folder) for folder in folders}
    pages["commands"] = _commands_page()
    pages["index"] = _index_page(folders)
    for name, text in pages.items():
        _update(api / f"{name}.md", text)
    generated = docs / "generated"
    generated.mkdir(exist_ok=True)
    _update(generated / "settings.md", _settings_tables())


def _update(path: pathlib.Path, text: str) -> None:
    """Leaves an equal file alone, so that Sphinx does not read it again."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _docstring(path: pathlib.Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _automodule(path: pathlib.Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"


def _folder_page(folder: pathlib.Path) -> str:
    files = sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")
    return "\n".join(
        [f"# copsd_jax.{folder.name}\n", _docstring(folder / "__init__.py") + "\n"]
        + [_automodule(path) for path in files]
    )


def _commands_page() -> str:
    files = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
    return "\n".join(["# Commands\n", *map(_automodule, files)])


def _index_page(folders: list[pathlib.Path]) -> str:
    lines = ["# Modules", "", "| folder | contents |", "|---|---|"]
    for folder in folders:
        summary = _docstring(folder / "__init__.py").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| [copsd_jax.{folder.name}]({folder.name}.md) | {summary} |")
    names = ["commands", *(folder.name for folder in folders)]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *names, "```", ""])


def _settings_tables() -> str:
    """One table per section: default, meaning, choices or range, and when a setting is read."""
    sections: dict[str, list[str]] = {}
    for setting in settings.describe(table_rules.collect_choice_tables()):
        meaning = [setting.comment]
        if setting.allowed:
            meaning.append("Allowed: " + re.sub("^, ", "'', ", setting.allowed))
        if setting.read_when:
            meaning.append(f"Read with {setting.read_when}")
        cells = f"`{setting.name}`", f"`{setting.default!r}`", "<br>".join(meaning)
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        sections.setdefault(setting.name.rpartition(".")[0], []).append(f"| {row} |")
    parts = []
    for section, rows in sections.items():
        title = section or "The run"
        parts += [f"## {title}", "", "| setting | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(parts)
