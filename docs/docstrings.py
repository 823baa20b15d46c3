"""Turns the docstrings of the package into reStructuredText.

The docstrings are plain text: code stands in single backticks, and pictures, formulas and tables
are indented or drawn with bars. Sphinx would read the first as a role and reflow the others.
"""

import re

SECTION = re.compile(r"(Args|Arguments|Attributes|Returns|Raises|Yields|Note|Example|Examples):$")
CODE = re.compile(r"(``[^`]+``|`[^`]+`)")


def process(app, what, name, obj, options, lines: list[str]) -> None:
    """Rewrites the lines of one docstring in place, as Sphinx's event asks."""
    del app, what, name, obj, options
    lines[:] = convert(lines)


def skip(app, what, name, obj, skipped: bool, options) -> bool | None:
    """Leaves out the fields of named tuples that have no docstring of their own."""
    del app, what, name, skipped, options
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field") else None


def convert(lines: list[str]) -> list[str]:
    """Returns the lines as reStructuredText; Google's sections keep their indentation.

    A run of indented lines outside of a section becomes a literal block, and so does a table.
    """
    out: list[str] = []
    section = literal = item = doctest = False
    for line in lines:
        indented, blank = line.startswith(" "), not line.strip()
        table = line.startswith("|")
        if blank:
            out.append("")
            item = doctest = False
            continue
        if not indented and not table:
            section = bool(SECTION.match(line))
            if literal:
                _separate(out)
                literal = False
        if line.lstrip().startswith(">>>") or doctest:
            doctest = True
            out.append(line)
            continue
        if section:
            out.append(_inline(line))
            continue
        starts_item = bool(re.match(r"(- |\d+\. )", line))
        if (indented and not item) or table:
            if not literal:
                _separate(out)
                out += ["::", ""]
                literal = True
            out.append(f"    {line}")
            continue
        if starts_item and not item:
            _separate(out)
        if item and not starts_item and not indented:
            _separate(out)
        item = starts_item or (item and indented)
        out.append(_inline(line))
    return out


def _separate(out: list[str]) -> None:
    """Ends with a blank line."""
    if out and out[-1]:
        out.append("")


def _inline(line: str) -> str:
    """Doubles the backticks of code, and escapes the marks of reStructuredText elsewhere."""
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            glued = parts[i + 1][:1].isalnum()  # a literal must end before a blank or a mark
            parts[i] = f"``{part.strip('`')}``" + ("\\ " if glued else "")
        else:
            parts[i] = re.sub(r"([\\*|`]|_\b|(?<=\w)_(?!\w))", r"\\\1", part)
    return "".join(parts)
