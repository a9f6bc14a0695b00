"""Evidence: what a network shows about its units on inputs. Each kind is gathered once, if asked.

Everything is told by column of the weights that read the units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import TaskError
from tersor.forms.form import rows, unrows
from tersor.measure import divergence_of, evaluating, reference_outputs
from tersor.measure.products import Products, unfused_recurrence
from tersor.measure.running import differentiable, differentiable_recurrence, unfused
from tersor.methods.cut.merging import fitted
from tersor.methods.cut.ranking import Ranking
from tersor.methods.cut.removing import End, Removable
from tersor.methods.layerwise import layers_of
from tersor.methods.moments import Metric
from tersor.surgery.walk import Site
from tersor.task import Inputs, Task
from tersor.task.data import pieces, rows_in

_PLACES = 64
_ROWS = 32
"""Samples of which one gradient is taken, even, since two rows may be one pair of sentences."""
_JUDGED = 128
_LEVELS = (0.25, 0.5, 0.75)
"""Shares of a group's units without which the network is run."""


class Evidence:
    """What `model` shows on calibration inputs; labels are asked for only by `gradients`."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        units: Sequence[Removable],
        *,
        samples: int,
        generator: torch.Generator,
    ) -> None:
        """units: all groups that will be asked about; generator: draws lots and labels"""
        self._model, self._task, self._samples = model, task, samples
        self.generator = generator
        ends = {end.site.name: end.site for group in units for end in group.readers}
        self._sites = list(ends.values())
        self._weights: list[nn.Parameter] = [getattr(*site.uses[0]) for site in self._sites]

    def moments(self, end: End) -> Tensor:
        """(groups, inputs, inputs) float64, of what the weight is given, damped."""
        return self._moments[end.site.name]

    def sizes(self, end: End) -> Tensor | None:
        """(inputs,) mean absolute values of what the weight is given; None where it is unseen."""
        return self._activity.get(end.site.name, (None, None))[0]

    def zeros(self, end: End) -> Tensor | None:
        """(inputs,) how often that is zero, 0 to 1; None where it is unseen."""
        return self._activity.get(end.site.name, (None, None))[1]

    def gradients(self, end: End) -> Tensor:
        """(batches, inputs) of weight times gradient of the task's loss, summed over outputs."""
        return self._gradients[end.site.name]

    def scores(self, end: End) -> Tensor:
        """(batches, inputs) the same of `Task.score`, whose square is a second derivative."""
        return self._scores[end.site.name]

    def harm(self, units: Removable, order: Sequence[int], losses: Sequence[float]) -> Ranking:
        """Losses of a group's outputs as divergence of the network, which is run without units.

        order, losses: units in the order in which they go, and what is lost with each gone
        """
        lost = torch.tensor(losses, dtype=torch.float64)
        counts = sorted({max(1, round(level * len(order))) for level in _LEVELS})
        factors = [
            self._without(units, order[:count]) / max(losses[count - 1], 1e-12) for count in counts
        ]
        total = lost * torch.from_numpy(np.interp(range(1, len(order) + 1), counts, factors))
        harms = total.cummax(0).values.diff(prepend=torch.zeros(1, dtype=torch.float64))
        return Ranking(list(order), harms.tolist())

    @cached_property
    def _moments(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in layers_of(self._model, self._task, self._sites, samples=self._samples):
            count = layer.matrix.shape[1]
            eye = torch.eye(count, device=layer.matrix.device)
            own = eye[None] if layer.moments is None else layer.moments.own
            damped = [Metric.damped(each) for each in own]
            found[layer.site.name] = torch.stack([m.block(0, count) for m in damped]).double()
        return found

    @cached_property
    def _activity(self) -> dict[str, tuple[Tensor, Tensor]]:
        watch = _Activity(self._sites)
        model, task = self._model, self._task
        with evaluating(model), unfused(), unfused_recurrence(model), torch.no_grad(), watch:
            for batch in task.calibration(self._samples):
                task.predict(model, batch)
        return watch.means()

    @cached_property
    def _gradients(self) -> dict[str, Tensor]:
        if not self._task.has_train:
            raise TaskError(
                'criterion="taylor" looks at the loss on labels and the task has no training data; '
                'give it some, or use criterion="fisher"'
            )

        def losses() -> Iterator[Tensor]:
            left = self._samples
            for inputs, targets in self._task.train():
                outputs = self._task.predict(self._model, inputs)
                yield self._task.loss(outputs, self._task.targets(inputs, targets))
                left -= rows_in(inputs)
                if left <= 0:
                    break

        return self._pulled(losses)

    @cached_property
    def _scores(self) -> dict[str, Tensor]:
        def losses() -> Iterator[Tensor]:
            for batch in pieces(self._task.calibration(self._samples), _ROWS):
                yield self._task.score(self._task.predict(self._model, batch), self.generator)

        return self._pulled(losses)

    def _pulled(self, losses: Callable[[], Iterator[Tensor]]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {site.name: [] for site in self._sites}
        with (
            evaluating(self._model),
            differentiable_recurrence(self._model),
            torch.enable_grad(),
            differentiable(self._weights),
        ):
            for loss in losses():
                slopes = torch.autograd.grad(loss, self._weights, allow_unused=True)
                for site, weight, slope in zip(self._sites, self._weights, slopes, strict=True):
                    pull = torch.zeros_like(weight) if slope is None else slope * weight.detach()
                    found[site.name].append(rows(pull, site.axis).sum(0))
        return {name: torch.stack(pulls) for name, pulls in found.items()}

    @cached_property
    def _judged(self) -> tuple[list[Inputs], list[Tensor]]:
        batches = self._task.calibration(min(self._samples, _JUDGED))
        return batches, reference_outputs(self._model, self._task, batches)

    def _without(self, units: Removable, gone: Sequence[int]) -> float:
        """Divergence without these units, the weights that read them fitted anew."""
        batches, answers = self._judged
        saved = [end.site.weight.clone() for end in units.readers]
        try:
            for end in units.readers:
                own, shape = self.moments(end), tuple(end.site.weight.shape)
                kept = torch.ones(own.shape[1], dtype=torch.bool)
                kept[end.lines[list(gone)].flatten()] = False
                matrix = rows(end.site.weight, end.site.axis)
                found = fitted(matrix, own, own, kept)
                end.site.weight.copy_(unrows(found, shape, end.site.axis))
            return divergence_of(self._model, self._task, batches, answers)
        finally:
            for end, weight in zip(units.readers, saved, strict=True):
                end.site.weight.copy_(weight)


class _Activity(Products):  # type: ignore[no-untyped-call]
    """Sums of absolute values, and how many are zero."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites, _PLACES)
        self._sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def met(self, site: Site, values: Callable[[], Tensor]) -> None:
        seen = values().flatten(0, 1)
        size, zeros, count = seen.abs().sum(0).double(), (seen == 0).sum(0), len(seen)
        if site.name in self._sums:
            before = self._sums[site.name]
            size, zeros, count = size + before[0], zeros + before[1], count + before[2]
        self._sums[site.name] = size, zeros, count

    def means(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (size / n, zeros / n) for name, (size, zeros, n) in self._sums.items()}
