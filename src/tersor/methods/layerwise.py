"""Layer after layer: each weight is quantized for what it is given by the layers quantized before.

The network runs once over all calibration inputs, side by side, and halts at each weight. Weights
that are used several times in a pass, or as a table as well, come first: their inputs are those of
the network as it was.

Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, section 3.3 and its code, for inputs of the
quantized prefix; Li et al. 2025 (GPTAQ), arXiv:2504.02692, eq. 5, and Zhang et al. 2026 (Qronos),
arXiv:2505.11695, for outputs of the original as the target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tersor.forms import Bitmask, NofM
from tersor.forms.form import Form, rows
from tersor.measure import evaluating
from tersor.measure.lockstep import Bring, Pass, lockstep
from tersor.measure.products import Products, unfused_recurrence
from tersor.measure.running import unfused
from tersor.methods.moments import Moments, Sums
from tersor.methods.sparse import check_uncoded, released
from tersor.surgery.walk import Site, walk
from tersor.task import Task

# Of a convolution, for each sample.
_PLACES = 64


@dataclass(frozen=True)
class Layer:
    """A weight to be quantized.

    matrix: (outputs, inputs) float32
    moments: None for a weight that no product was seen of, such as a table's
    sparse: what held it, if it was pruned
    """

    site: Site
    matrix: Tensor
    moments: Moments | None = None
    sparse: Bitmask | NofM | None = None

    @property
    def zeros(self) -> Tensor | None:
        """(outputs, inputs) bool, where it was pruned; None if it was not."""
        if self.sparse is None:
            return None
        return rows(self.sparse.dense(), self.site.axis) == 0


Quantize = Callable[[Layer], Form]


@dataclass(frozen=True)
class Passes:
    """A network's weights, and calls of it without gradients, one for each batch."""

    sites: Sequence[Site]
    runs: Sequence[Pass]


def layerwise(
    model: nn.Module,
    task: Task,
    sites: Sequence[Site],
    quantize: Quantize,
    *,
    samples: int,
    original: bool | nn.Module = False,
) -> None:
    """Holds each of `sites` as what `quantize` makes of it, in the order in which they are used.

    samples: calibration inputs to use, at most
    original: whether the network as it is runs beside, for `Moments.cross`; or another one, where
        that has been changed already

    Raises ModelError for inputs that are not finite. Whatever ends it early, what is quantized by
    then is held, and all other weights are as they were.
    """
    batches = task.calibration(samples)
    check_uncoded(sites)
    twin = copy.deepcopy(model) if original is True else original or None
    with evaluating(model), unfused(), unfused_recurrence(model):
        here = Passes(sites, [partial(task.predict, model, batch) for batch in batches])
        if twin is None:
            in_order(here, quantize)
            return
        named = {site.name: site for site in walk(twin)}
        with evaluating(twin):
            there = Passes(
                [named[site.name] for site in sites],
                [partial(task.predict, twin, batch) for batch in batches],
            )
            in_order(here, quantize, there)


def layers_of(model: nn.Module, task: Task, sites: Sequence[Site], *, samples: int) -> list[Layer]:
    """The weights as they are, with the moments of the network as it is.

    Weights held by sparse forms become plain; `Layer.sparse` is what held them.
    """
    check_uncoded(sites)
    sparse = {site.name: released(site) for site in sites}
    watch = _Adding(sites)
    with evaluating(model), unfused(), unfused_recurrence(model), torch.no_grad(), watch:
        for batch in task.calibration(samples):
            task.predict(model, batch)
    found = {name: total.moments() for name, total in watch.sums.items()}
    return [
        Layer(site, rows(site.weight, site.axis).float(), found.get(site.name), sparse[site.name])
        for site in sites
    ]


def in_order(here: Passes, quantize: Quantize, there: Passes | None = None) -> None:
    """The same for any calls. there: those of the original, weight for weight and batch for batch

    Weights are changed in place as the calls come to them, and held at the end.
    """
    sparse = {site.name: released(site) for site in here.sites}
    if there is not None:
        for site in there.sites:
            released(site)
    forms: dict[str, Form] = {}

    def take(site: Site, moments: Moments | None) -> None:
        matrix = rows(site.weight, site.axis).float()
        form = quantize(Layer(site, matrix, moments, sparse[site.name]))
        site.weight.copy_(form.dense())
        forms[site.name] = form

    try:
        with torch.no_grad():
            order, several = _order(here)
            for site in (s for s in here.sites if s.name not in order):
                take(site, None)
            _take_several(here, [s for s in here.sites if s.name in several], take)
            once = [name for name in order if name not in several]
            _take_once(here, there, once, take)
    finally:
        for site in here.sites:
            form = forms.get(site.name, sparse[site.name])
            if form is not None:
                site.hold(form)


class _Uses(Products):  # type: ignore[no-untyped-call]
    """How often each weight is used, in the order of their first uses."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites)
        self.products: dict[str, int] = {}
        self.lookups: set[str] = set()

    def met(self, site: Site, values: Bring) -> None:
        self.products[site.name] = self.products.get(site.name, 0) + 1

    def looked_up(self, site: Site, indices: Tensor) -> None:
        self.lookups.add(site.name)


def _order(here: Passes) -> tuple[list[str], set[str]]:
    """Names in the order of use, and which of them are used in several ways."""
    watch = _Uses(here.sites)
    with watch:
        here.runs[0]()
    several = {n for n, count in watch.products.items() if count > 1 or n in watch.lookups}
    return list(watch.products), several


class _Adding(Products):  # type: ignore[no-untyped-call]
    """Adds up the moments of weights that are met several times."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites, _PLACES)
        self.sums: dict[str, Sums] = {}

    def met(self, site: Site, values: Bring) -> None:
        self.sums.setdefault(site.name, Sums()).add(site, values())


def _take_several(
    here: Passes, sites: Sequence[Site], take: Callable[[Site, Moments | None], None]
) -> None:
    if not sites:
        return
    watch = _Adding(sites)
    with watch:
        for run in here.runs:
            run()
    for site in sites:
        take(site, watch.sums[site.name].moments())


def _take_once(
    here: Passes,
    there: Passes | None,
    names: Sequence[str],
    take: Callable[[Site, Moments | None], None],
) -> None:
    count = len(here.runs)
    named = [{site.name: site for site in p.sites} for p in (here, there) if p is not None]
    runs = [*here.runs, *(there.runs if there is not None else ())]
    sites = [[named[n // count][name] for name in names] for n in range(len(runs))]

    def arrived(site: Site, brings: dict[int, Bring]) -> None:
        total = Sums()
        for number in sorted(n for n in brings if n < count):
            other = brings.get(number + count)
            total.add(site, brings[number](), None if other is None else other())
        take(site, total.moments())

    lockstep(runs, sites, arrived, _PLACES)
