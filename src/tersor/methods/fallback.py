"""Falling back to float: layers whose integers cost most go back to floats, as far as asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tersor.errors import TaskError
from tersor.forms import Form
from tersor.forms.grid import Rounding
from tersor.measure import divergence_of, reference_outputs
from tersor.methods.placing import Place, Spot
from tersor.surgery.grids import put, remove
from tersor.surgery.hold import form_of, release
from tersor.surgery.walk import Site
from tersor.task import Inputs, Task

MOST = 128
"""Inputs that each layer is judged on."""

Plain = Mapping[str, Form | nn.Parameter]
"""How weights were stored before, by name of the site."""


@dataclass(frozen=True)
class Judge:
    """Held-out inputs, or else calibration inputs, and the float network's answers to them."""

    task: Task
    batches: Sequence[Inputs]
    answers: Sequence[Tensor]

    @classmethod
    def of(cls, model: nn.Module, task: Task, samples: int) -> Judge:
        """Answers of the network as it is now."""
        batches = task.holdout(min(samples, MOST)) or task.calibration(min(samples, MOST))
        if not batches:
            raise TaskError("a fallback is judged on inputs and the task has none; give it some")
        return cls(task, batches, reference_outputs(model, task, batches))

    def divergence(self, model: nn.Module) -> float:
        """Mean over the inputs."""
        return divergence_of(model, self.task, self.batches, self.answers)


@dataclass
class _Unit:
    """What goes back to float together: one grid and the layers whose products it made integer."""

    name: str
    places: dict[Place, Rounding]
    sites: list[Site]
    forms: dict[str, Form]

    def lift(self, plain: Plain) -> None:
        for layer, where in self.places:
            remove(layer, where)
        for site in self.sites:
            before = plain[site.name]
            if isinstance(before, Form):
                site.hold(before)
                continue
            for layer, attribute in site.uses:
                release(layer, attribute, before)

    def restore(self) -> None:
        for (layer, where), grid in self.places.items():
            put(layer, where, grid)
        for site in self.sites:
            site.hold(self.forms[site.name])


def fall_back(
    model: nn.Module,
    judge: Judge,
    spots: Sequence[Spot],
    grids: Sequence[Rounding],
    sites: Sequence[Site],
    plain: Plain,
    share: float,
) -> dict[str, Any]:
    """Leaves the worst layers in float until `share` of the divergence is gone, in place.

    spots, grids: what was put, in the same order
    sites: weights that are codes now
    plain: how their weights were stored before

    Each grid is judged alone first: how much less the divergence is without it and without the
    codes of its layers. Then they go in that order, those that turn out to help nothing excepted.
    """
    units = [_unit(model, spot, grid, sites) for spot, grid in zip(spots, grids, strict=True)]
    before = left = judge.divergence(model)
    alone = []
    for unit in units:
        unit.lift(plain)
        alone.append(judge.divergence(model))
        unit.restore()
    lifted: dict[str, float] = {}
    for _, number in sorted((d, n) for n, d in enumerate(alone) if d < before):
        if left <= (1 - share) * before:
            break
        units[number].lift(plain)
        now = judge.divergence(model)
        if now < left:
            lifted[units[number].name] = left - now
            left = now
        else:
            units[number].restore()
    return {"float": lifted, "divergence_before": before, "divergence_after": left}


def _unit(model: nn.Module, spot: Spot, grid: Rounding, sites: Sequence[Site]) -> _Unit:
    names = {module: name for name, module in model.named_modules()}
    own = [s for s in sites if any(layer in spot.layers for layer, _ in s.uses)]
    # A weight that is used elsewhere too, an embedding's, stays as it is.
    own = [s for s in own if all(layer in spot.layers for layer, _ in s.uses)]
    forms = {site.name: form for site in own if (form := form_of(*site.uses[0])) is not None}
    (first, where), *_ = spot.places
    name = ", ".join(names[layer] for layer in spot.layers) or f"{where} of {names[first]}"
    return _Unit(name, dict.fromkeys(spot.places, grid), own, forms)
