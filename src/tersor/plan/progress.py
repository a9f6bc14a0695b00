"""The progress bar of a run, with what it is doing now and the time that remains."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Trials that a search takes, in units of one measured choice.
_TRIALS = 60


class Bar:
    """Counts units of work on standard error; draws nothing where that is no terminal."""

    def __init__(self, *, enabled: bool) -> None:
        """`enabled=False` never draws."""
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("reading the model", total=None)

    def __enter__(self) -> Self:
        """Starts drawing."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops drawing."""
        self._progress.stop()

    def plan(self, units: int) -> None:
        """States how many units come before the first trial."""
        self._progress.update(self._task, total=units + _TRIALS)

    def doing(self, what: str) -> None:
        """Says what is being done now."""
        self._progress.update(self._task, description=what)

    def advance(self, units: int = 1) -> None:
        """Units done; a run that took fewer trials than planned jumps ahead at its end."""
        self._progress.advance(self._task, units)
