"""Reports: the same figures for a terminal, a page and a program."""

from tersor.report.page import html
from tersor.report.store import as_json, read
from tersor.report.terminal import terminal

__all__ = ["as_json", "html", "read", "terminal"]
