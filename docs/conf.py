"""Sphinx builds these pages from Markdown, and the API pages from the docstrings of the package."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import docstrings
import generate

project = "copsd_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["generated"]
html_theme = "furo"
html_title = "copsd_jax"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Types such as `bytes` share their name with attributes of the package.
suppress_warnings = ["ref.python"]

generate.write(HERE)


def setup(app) -> None:
    """Rewrites docstrings before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", docstrings.process, priority=1)
    app.connect("autodoc-skip-member", docstrings.skip)
