"""tersor report: the report of a run, again."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.running import Answer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or report.json.")],
    html: Annotated[
        Path | None, typer.Option(help="Write the page here instead of into the folder.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> Answer:
    """Prints the report of a run and writes its page again."""
    from tersor.report import html as write
    from tersor.report import read
    from tersor.report.terminal import report_view

    figures = read(run)
    page = write(figures, html or (run if run.is_dir() else run.parent) / "report.html")
    if show:
        typer.launch(str(page))
    shown = {**figures, "files": {"report": str(page)}}
    return Answer(shown, lambda: report_view(shown))
