"""A progress bar: what is being done, how far it is, and the time that remains."""

from __future__ import annotations

from types import TracebackType
from typing import ClassVar, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Counts units of work on standard error; draws nothing where that is no terminal.

    Inside another one it is a row below that one's.
    """

    _open: ClassVar[list[Progress]] = []

    def __init__(
        self, doing: str, units: int | None = None, *, done: int = 0, shown: bool = True
    ) -> None:
        """Units are of all the work, None until `plan` tells; `shown=False` never draws."""
        self._outer = self._open[-1] if self._open else None
        self._progress = self._outer or _drawn(shown)
        self._task = self._progress.add_task(doing, total=units, completed=done, note="")

    def __enter__(self) -> Self:
        """Starts drawing."""
        if self._outer is None:
            self._open.append(self._progress)
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops drawing."""
        if self._outer is None:
            self._open.remove(self._progress)
            self._progress.stop()
        else:
            self._progress.remove_task(self._task)

    def plan(self, units: int) -> None:
        """States how many units there are."""
        self._progress.update(self._task, total=units)

    def doing(self, what: str) -> None:
        """Says what is being done now."""
        self._progress.update(self._task, description=what)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Units that are done. note: stands behind them"""
        self._progress.update(self._task, advance=units, note=note and f"  {note}")


def _drawn(shown: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    )
