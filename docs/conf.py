"""The site of the documentation: `make docs`. Needs no network."""

import sys
from pathlib import Path


DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "src")]

import site_pages  # noqa: E402 (from this folder)

from entropy_trl import __version__  # noqa: E402


project = "entropy_trl"
author = copyright = "The entropy_trl contributors"
release = __version__
html_title = f"entropy_trl {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
# The pages' links and anchors are those that GitHub makes. A link that leads nowhere is a warning, hence an error.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings have the types, with shapes and units
# An attribute is documented by the docstring of its class.
napoleon_use_ivar = True


def setup(app):
    site_pages.write_pages(DOCS / "generated")
    app.connect("source-read", site_pages.add_contents)
    app.connect("autodoc-process-docstring", site_pages.to_rst, priority=100)  # before napoleon
