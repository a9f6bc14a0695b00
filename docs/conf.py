"""Sphinx: the Markdown pages of this folder as HTML."""

from importlib.metadata import version as installed

project = "tersor"
author = "The tersor authors"
version = release = installed("tersor")

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"tersor {version}"
