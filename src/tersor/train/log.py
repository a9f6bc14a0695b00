"""Where a training shows how far it is, and keeps itself for the case that it is killed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tersor.errors import OutputError
from tersor.progress import Bar
from tersor.train import checkpoint

if TYPE_CHECKING:
    from tersor.train.distributed.together import Together

_POINTS = 400
"""Of a curve, at most; then two by two become one."""


@dataclass
class Curve:
    """How a training went.

    losses: means over `stride` steps each, in order
    judged: by epoch, what the judge said; the first is of the start
    kept: the epoch whose state was left behind
    """

    losses: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    stride: int = 1
    kept: int = 0
    _open: list[float] = field(default_factory=list)

    def add(self, loss: float) -> None:
        """The loss of one more step."""
        self._open.append(loss)
        if len(self._open) == self.stride:
            self.losses.append(sum(self._open) / self.stride)
            self._open.clear()
        if len(self.losses) == _POINTS:
            self.losses = [sum(two) / 2 for two in zip(*[iter(self.losses)] * 2, strict=True)]
            self.stride *= 2

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {
            "losses": list(self.losses),
            "judged": list(self.judged),
            "stride": self.stride,
            "open": list(self._open),
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Curve:
        """The inverse of `state`."""
        return cls(state["losses"], state["judged"], state["stride"], _open=state["open"])

    def bounds(self) -> tuple[float, float]:
        """What was said of the start, and of the state that was kept; NaN where nothing was."""
        return (self.judged[0], self.judged[self.kept]) if self.judged else (math.nan, math.nan)


class TrainingLog:
    """Follows the trainings of a recipe: pass it to `run`, read `curves` behind it.

    folder: where checkpoints go; the same recipe with the same folder goes on where it was killed.
        None keeps none
    minutes: between two checkpoints inside an epoch; there is one behind each epoch
    name, about: of the training in hand, set by `run`, and its options, noted by the technique
    show: draw a progress bar with the time that remains, if standard error is a terminal
    together: makes what joins this process with others in each training, as `Averaging`: every one
        learns from its rows of each batch, and all end with the same weights. Each has to run the
        same recipe, with a folder of its own
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        minutes: float = 5.0,
        show: bool = True,
        together: Callable[[], Together] | None = None,
    ) -> None:
        self.curves: dict[str, Curve] = {}
        self.name = "training"
        self.about = ""
        self._folder = None if folder is None else Path(folder)
        self._seconds = 60 * minutes
        self._show = show
        self.together = together
        self._written = time.monotonic()

    @property
    def path(self) -> Path | None:
        """Of the checkpoint of the training in hand."""
        return self._folder and self._folder / f"{self.name}.training.safetensors"

    @property
    def spare(self) -> Path | None:
        """Of the checkpoint before it, where that is kept too."""
        return self.path and self.path.with_suffix(".before.safetensors")

    def read(self) -> list[dict[str, Any]]:
        """What was kept of the training in hand, the newest first."""
        self._written = time.monotonic()
        found = [checkpoint.read(path) for path in (self.path, self.spare) if path is not None]
        return [state for state in found if state is not None]

    def due(self) -> bool:
        """Whether the last checkpoint is old."""
        return self.path is not None and time.monotonic() - self._written >= self._seconds

    def store(self, state: dict[str, Any], *, spare: bool = False) -> None:
        """Keeps the training in hand, in place of what was kept of it.

        spare: keep that too, since another process may have been killed before it kept this one
        """
        if self.path is not None and self.spare is not None:
            if spare and self.path.exists():
                self.path.replace(self.spare)
            checkpoint.store(self.path, state)
            self._written = time.monotonic()

    def report(self) -> list[dict[str, Any]]:
        """For the key `training` of a report: what the page draws learning curves from."""
        return [
            {
                "step": name,
                "losses": c.losses,
                "judged": c.judged,
                "stride": c.stride,
                "kept": c.kept,
            }
            for name, c in self.curves.items()
        ]

    def rescue(self, weights: Mapping[str, Tensor]) -> Path | None:
        """Keeps the best state of a training that failed, as a file of safetensors.

        None without a folder, or where it cannot be written.
        """
        if self.path is None:
            return None
        path = self.path.with_suffix("").with_suffix(".best.safetensors")
        try:
            checkpoint.store_tensors(path, weights)
        except OutputError:
            # The error that is on its way says more.
            return None
        return path

    def forget(self) -> None:
        """Leaves nothing of the training in hand."""
        for path in (self.path, self.spare):
            if path is not None:
                path.unlink(missing_ok=True)

    def bar(self, steps: int, done: int) -> Bar:
        """Shows the training in hand."""
        return Bar(self.name, steps, done=done, shown=self._show)
