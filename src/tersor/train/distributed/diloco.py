"""DiLoCo: workers train alone for hundreds of steps, and then move together.

The fewest bytes of all, and the only one that bears slow links: workers talk once in `every` steps.
Between exchanges their weights differ. `LocalUpdates` is its regime for real processes,
`simulate_local` its simulation.

Source: Douillard et al. 2023, arXiv:2311.08105, algorithm 1 (inner AdamW; outer SGD with Nesterov
momentum 0.9, outer rate 0.7; 500 inner steps).
Differs from the paper: what workers have moved by may be compressed on its way; running statistics
of batch norms are averaged beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.task.data import check_count
from tersor.train.distributed.compressor import Compressor, Uncompressed
from tersor.train.distributed.exchange import Group, in_processes
from tersor.train.distributed.together import (
    Together,
    average_statistics,
    begin_alike,
)
from tersor.train.distributed.traffic import plain_bytes
from tersor.train.states import put


@dataclass(frozen=True)
class DiLoCo:
    """How often workers move together, and how far.

    every: inner steps between two outer ones, at least 1
    rate: of the outer step, above 0; 1 with momentum 0 takes the mean of the workers' weights
    momentum: Nesterov's, of outer steps, 0 to below 1
    compressor: of how far a worker has moved; None sends float32

    Raises OptionError for values outside.
    """

    every: int = 500
    rate: float = 0.7
    momentum: float = 0.9
    compressor: Compressor | None = None

    def __post_init__(self) -> None:
        check_count(self.every, "every")
        if not self.rate > 0:
            raise OptionError(f"rate={self.rate!r} of the outer step must be above 0; try 0.7")
        if not 0 <= self.momentum < 1:
            raise OptionError(
                f"momentum={self.momentum!r} must be at least 0 and below 1; the paper has 0.9"
            )
        if self.momentum and self.compressor is not None and self.compressor.momentum:
            raise OptionError(
                f"{self.compressor!r} brings a momentum, and the outer step has {self.momentum}; "
                "give one of them momentum=0"
            )

    def own_compressor(self) -> Compressor:
        """A compressor for one worker."""
        return copy.deepcopy(self.compressor or Uncompressed())


class Outer:
    """The weights that workers have in common, and the step that they take together.

    weights: as all workers have them at the start; copied
    """

    def __init__(self, weights: Sequence[Tensor], settings: DiLoCo) -> None:
        self.weights = [weight.detach().clone() for weight in weights]
        self._optimizer = torch.optim.SGD(
            self.weights,
            lr=settings.rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )

    def moved(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """How far a worker has gone: common weights less its own, to be averaged over workers."""
        return [old - new.detach() for old, new in zip(self.weights, weights, strict=True)]

    def step(self, moved: Sequence[Tensor]) -> None:
        """Moves the common weights, given the mean over workers of `moved`."""
        for weight, change in zip(self.weights, moved, strict=True):
            weight.grad = change
        self._optimizer.step()

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"weights": self.weights, "optimizer": self._optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        put(self.weights, state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])


class LocalUpdates(Together):
    """Between processes: steps of `fit` alone, then one together; the last step is one too.

    States between exchanges are no result, since each process has another; nor is an average of
    them, so `fit` refuses `ema` beside this.

    group: of processes; None means all

    Raises OptionError in `begin` without a process group, and where networks differ.
    """

    paced = apart = True

    def __init__(self, settings: DiLoCo | None = None, *, group: Group = None) -> None:
        super().__init__(group)
        self._settings = settings or DiLoCo()
        self.about = repr(self._settings)
        self._compressor = self._settings.own_compressor()
        self._alone = 0

    def begin(self, model: nn.Module, steps: int) -> None:
        """Every process starts from the weights of the first."""
        self._model, self._steps, self._trained = model, steps, self._all(model)
        begin_alike(model, self.group)
        self._outer = Outer(self._trained, self._settings)

    def after(self, step: int) -> None:
        """Exchanges where it is time."""
        self._alone += 1
        self.traffic.plain += plain_bytes(self._trained)
        if self._alone < self._settings.every and step + 1 < self._steps:
            return
        talk = self._compressor.average(self._outer.moved(self._trained))
        averaged, sent = in_processes(talk, self.group)
        self._outer.step(averaged)
        put(self._trained, self._outer.weights)
        self.traffic.sent += sent + average_statistics(self._model, self.group)
        self._alone = 0

    @property
    def settled(self) -> bool:
        """Whether all processes have the same weights."""
        return self._alone == 0

    def state(self) -> dict[str, Any]:
        """Of this process; another's differs."""
        return {
            "outer": self._outer.state(),
            "compressor": self._compressor.state(),
            "at": [self._alone, self.traffic.sent, self.traffic.plain],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._outer.restore(state["outer"])
        self._compressor.restore(state["compressor"])
        self._alone, self.traffic.sent, self.traffic.plain = state["at"]
