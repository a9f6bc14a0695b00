"""Reports: the same figures for a terminal, a page and a program."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.files import write_text
from tersor.report.page import html
from tersor.report.store import as_json, read
from tersor.report.terminal import terminal

if TYPE_CHECKING:
    from tersor.task import Task

__all__ = ["as_json", "finish", "html", "read", "terminal"]


def finish(report: dict[str, Any], folder: Path, task: "Task | None" = None) -> Path:
    """Writes report.json and report.html into a run's folder and returns the page.

    task: where to fetch the samples whose decision changed
    """
    if task is not None:
        from tersor.report.examples import illustrate

        illustrate(report, task)
    write_text(folder / "report.json", as_json(report))
    return html(report, folder / "report.html")
