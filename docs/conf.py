"""Sphinx configuration: `sphinx-build -W --keep-going docs docs/_build`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generated

import pgpo_jax

project = "pgpo_jax"
author = "the authors of pgpo_jax"
version = release = pgpo_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pgpo_jax {version}"
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings have single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def setup(app):
    """Writes the generated pages before Sphinx looks for pages."""
    app.connect("builder-inited", lambda _: generated.write())
