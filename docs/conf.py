"""Sphinx configuration: MyST pages, docstrings in Google style, the furo theme."""

from __future__ import annotations

import gradkern

project = "gradkern"
author = "The gradkern authors"
copyright = author
version = release = gradkern.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Numerics", "Source"]

html_theme = "furo"
html_title = f"gradkern {release}"
