"""Mixed precision: for each weight its own method and width, all together within the bits allowed.

For one mean width where layers differ in what they can bear, as in most convolutional networks. It
measures every choice for every weight, so it takes minutes where `quantize.qronos` takes seconds.
For the smallest file use `quantize.entropy`, whose bits are shared out by the coder itself.

Source: Dong et al. 2020 (HAWQ-V2), arXiv:1911.03852, eq. 8, for the allocation; Sieberling,
Kuznedelev, Kurtic, Alistarh 2025 (EvoPress), arXiv:2410.14649, algorithm 1, for its refinement.
Differs from the papers: a choice costs the divergence that was measured with it alone, and the
refinement swaps levels of weights of any size, within the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from tersor.errors import BudgetError, OptionError, TaskError
from tersor.forms.form import Form
from tersor.measure import divergence_of, reference_outputs
from tersor.measure.sensitivity import probing
from tersor.methods.allocate import allocate
from tersor.methods.encoders import Encoder, encoder
from tersor.methods.layerwise import Layer, layers_of, layerwise
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Inputs, Task

_CHILDREN = 8
"""Allocations tried in each generation."""
_JUDGED = 256
"""Calibration inputs that choices are measured on, at most."""


@method
def mixed(
    model: nn.Module,
    task: Task | None = None,
    *,
    bits: Annotated[float, Field(gt=0, le=16)] = 4.0,
    choices: Sequence[str] = ("gptq 2", "gptq 3", "gptq 4", "gptq 5", "gptq 6", "gptq 8"),
    generations: Annotated[int, Field(ge=0)] = 8,
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Stores every weight of two or more dimensions by one of the choices, in place.

    bits: stored bits per weight on average, scales included
    choices: what a weight may become, "method bits" or "method bits group_size": methods are gptq,
        adaround and rtn, and "nvfp4", "mxfp4" alone
    generations: of the refinement; 0 takes the allocation as it is
    samples: calibration inputs to use, at most; 256 of them for measuring
    include, exclude: patterns on names and types, see `walk`

    The outcome holds the bits reached, the choice of each weight, and the divergence of the
    allocation before and after its refinement, on held-out inputs if the task has them. Raises
    TaskError without data, OptionError for an unknown choice or a weight that is quantized already,
    BudgetError for bits below the least.
    """
    if task is None:
        raise TaskError("quantize.mixed needs inputs to run the network on; pass a task")
    if not choices:
        raise OptionError('choices=[] leaves nothing to choose from; give some, such as "gptq 4"')
    encoders = [encoder(choice) for choice in choices]
    sites = walk(model, include, exclude)
    table = _measured(model, task, sites, encoders, samples)
    limit = int(bits * sum(site.weight.numel() for site in sites) / 8)
    try:
        taken = allocate([row.options() for row in table], limit)
    except BudgetError as error:
        raise BudgetError(f"bits={bits} with choices={list(choices)}: {error}") from None
    count = min(samples, _JUDGED)
    judged = [inputs for inputs in (task.calibration(count), task.holdout(count)) if inputs]
    search = _Search(model, task, judged, table, limit)
    before = search.losses(taken)
    taken, after = search.refined(taken, before, generations)
    chosen = {row.site.name: pick for row, pick in zip(table, taken, strict=True)}

    for row in table:
        if row.sparse is not None:
            row.site.hold(row.sparse)

    def quantize(layer: Layer) -> Form:
        return encoders[chosen[layer.site.name]](layer)

    layerwise(model, task, sites, quantize, samples=samples, original=True)
    spent = sum(row.sizes[pick] for row, pick in zip(table, taken, strict=True))
    return model, {
        "bits": 8 * spent / sum(site.weight.numel() for site in sites),
        "choices": {name: choices[pick] for name, pick in chosen.items()},
        "divergence_allocated": before[-1],
        "divergence_refined": after[-1],
    }


@dataclass(frozen=True)
class _Row:
    """One weight: its forms by choice, their bytes, and the divergence that each causes alone.

    sparse: what held it, if it was pruned
    """

    site: Site
    sparse: Form | None
    forms: list[Form]
    sizes: list[int]
    losses: list[float]

    def options(self) -> list[tuple[int, float]]:
        return list(zip(self.sizes, self.losses, strict=True))


def _measured(
    model: nn.Module, task: Task, sites: Sequence[Site], encoders: list[Encoder], samples: int
) -> list[_Row]:
    layers = layers_of(model, task, sites, samples=samples)
    found = []
    with probing(model, task, task.calibration(min(samples, _JUDGED))) as loss:
        for layer in layers:
            forms = [encode(layer) for encode in encoders]
            sizes = [math.ceil(form.stored_bits() / 8) for form in forms]
            losses = [max(0.0, loss(layer.site, form)) for form in forms]
            found.append(_Row(layer.site, layer.sparse, forms, sizes, losses))
    return found


@dataclass
class _Search:
    """Allocations by the divergence that they cause as a whole.

    judged: calibration inputs, and held-out ones if there are any
    """

    model: nn.Module
    task: Task
    judged: Sequence[Sequence[Inputs]]
    table: list[_Row]
    limit: int

    def __post_init__(self) -> None:
        self._answers = [reference_outputs(self.model, self.task, each) for each in self.judged]
        self._weights = [row.site.weight.clone() for row in self.table]
        self._generator = torch.Generator().manual_seed(0)

    def losses(self, taken: Sequence[int]) -> list[float]:
        """The divergences on each of `judged`; the weights are as they were after it."""
        try:
            for row, pick in zip(self.table, taken, strict=True):
                row.site.weight.copy_(row.forms[pick].dense())
            return [
                divergence_of(self.model, self.task, inputs, answers)
                for inputs, answers in zip(self.judged, self._answers, strict=True)
            ]
        finally:
            for row, weight in zip(self.table, self._weights, strict=True):
                row.site.weight.copy_(weight)

    def refined(
        self, taken: list[int], losses: list[float], generations: int
    ) -> tuple[list[int], list[float]]:
        """The best of all that were tried, each changed in a few places from the best before it.

        Better is what is better everywhere: on the calibration inputs alone, the best of many is
        often the luckiest.
        """
        for _ in range(generations):
            for child in list(self._children(taken)):
                found = self.losses(child)
                if all(new < old for new, old in zip(found, losses, strict=True)):
                    taken, losses = child, found
        return taken, losses

    def _children(self, taken: list[int]) -> Iterator[list[int]]:
        seen = {tuple(taken)}
        for _ in range(_CHILDREN):
            child = self._mutated(taken)
            if tuple(child) not in seen:
                seen.add(tuple(child))
                yield child

    def _mutated(self, taken: list[int]) -> list[int]:
        """Some weights get the next larger choice, others the next smaller until all fit again.

        What is left of the bytes then goes to whichever weights it is enough for.
        """
        child, risen = list(taken), set[int]()
        for _ in range(1 + self._draw(3)):
            place = self._draw(len(child))
            child[place] = self._next(place, child[place], larger=True)
            risen.add(place)
        others = [place for place in range(len(child)) if place not in risen]
        while self._spent(child) > self.limit:
            movable = [p for p in others if self._next(p, child[p], larger=False) != child[p]]
            if not movable:
                return list(taken)
            place = movable[self._draw(len(movable))]
            child[place] = self._next(place, child[place], larger=False)
        for place in torch.randperm(len(child), generator=self._generator).tolist():
            larger = self._next(place, child[place], larger=True)
            sizes = self.table[place].sizes
            if self._spent(child) + sizes[larger] - sizes[child[place]] <= self.limit:
                child[place] = larger
        return child

    def _next(self, place: int, pick: int, *, larger: bool) -> int:
        sizes = self.table[place].sizes
        beyond = [
            p for p, s in enumerate(sizes) if (s > sizes[pick] if larger else s < sizes[pick])
        ]
        if not beyond:
            return pick
        return min(beyond, key=lambda p: abs(sizes[p] - sizes[pick]))

    def _spent(self, taken: Sequence[int]) -> int:
        return sum(row.sizes[pick] for row, pick in zip(self.table, taken, strict=True))

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._generator))
