"""Entropy-penalised training: weights and steps are trained against the bits of their codes.

For the smallest file of all where there are labels, or many inputs, and minutes to train: weights
that cost more bits than they are worth become zero or small, the others make up for them. Frozen
and coded it takes the bits that were asked for. Without time to train take `quantize.entropy`.

Source: Oktay et al. 2020, arXiv:1906.06624, eq. 5, for the bits in the loss; Wiedemann et al. 2020
(DeepCABAC), arXiv:1907.11900, for a coder's own estimate of them.
Differs from the papers: weights are trained themselves, rounded with gradients straight through;
the estimate is that of `rates`, by place, between whole numbers on a line; how much a bit counts is
steered so that as many are left in the end as were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.forms.rounded import Rounded
from tersor.methods import rates
from tersor.methods.learning import learn
from tersor.methods.masking import masked, schooling
from tersor.methods.sparse import Zeros, check_uncoded, released, sparse_form
from tersor.recipe import Outcome, method
from tersor.surgery.fold import absorb_statistics
from tersor.surgery.walk import Patterns, Site, vectors, walk
from tersor.task import Task
from tersor.train import Regime, TrainingLog

_TEMPERATURE = 2.0
"""Of the original's answers."""
_FINE, _FINER = 4.0, 16.0
"""Steps in a standard deviation at the start, of weights and of vectors."""
_COUNTS = 200
"""Of codes in a training, however long it is: each of them may change the price by as much."""
_RAMP, _HOLD = 0.5, 0.9
"""Shares of the training in which bits are taken away, and after which they count as they do."""
_MOST = 1e3
"""Of the price of a bit, where more of it changes nothing any more."""
_MISSED = 1.03
"""So many times the bits asked for are still taken for a result."""


@method
def rate(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    bits: Annotated[float, Field(gt=0, le=8)] = 1.0,
    epochs: Annotated[int, Field(ge=1)] = 20,
    rate: Annotated[float, Field(gt=0, le=1)] = 3e-3,
    labels: Annotated[float, Field(ge=0, le=1)] | None = None,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains the network with rounded weights, in place, and stores them as `Trellis` forms.

    original: whose answers are learned too; by default this network as it is
    bits: mean bits per weight of two or more dimensions, as an adaptive coder will need them
    epochs: passes over the training data, or the calibration inputs where there is none
    rate: of the optimizer, the highest
    labels: their share in the loss beside the answers, 0 to 1; None for half where there are any.
        With 1 there is no teacher
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs
    include, exclude: patterns on names and types, see `walk`; others stay as they are

    The step's outcome holds the estimated bits and how much one counted in the end. Where the bits
    asked for were not reached, it has `asked`. Pruned weights stay zero. Raises OptionError for a
    weight that is quantized already, TaskError without inputs.
    """
    lessons, teacher = schooling("quantize.rate", model, task, original, labels, _TEMPERATURE)
    sites = walk(model, include, exclude)
    check_uncoded(sites)
    sparse = [site for site in sites if sparse_form(site.form) is not None]
    absorb_statistics(model)
    others = vectors(model, include, exclude)
    with masked(model, [*sites, *others], start):
        forms = [rounded(site) for site in (*sites, *others)]
        spending = Spending(forms[: len(sites)], bits)
        outcome = learn(
            "quantize.rate",
            model,
            lessons,
            teacher,
            parameters=[parameter for form in forms for parameter in form.parameters()],
            epochs=epochs,
            rate=rate,
            training=training,
            generator=generator,
            regimes=[spending, Zeros([rounded(site).latent for site in sparse])],
            log=log,
            batch_norms=False,
        )
    spent = spending.count()
    freeze([*sites, *others])
    outcome |= {"bits": spent, "weight_of_a_bit": spending.price}
    return model, outcome | ({"asked": bits} if spent > _MISSED * bits else {})


class Spending(Regime):
    """Adds to the loss what the codes of all weights cost, at a price that is steered.

    forms: those whose bits count
    bits: for each of their weights in the end
    """

    paced = True

    def __init__(self, forms: Sequence[Rounded], bits: float) -> None:
        self._forms, self._bits = forms, bits
        self._size = sum(form.latent.numel() for form in forms)
        self.price = 1e-2
        self._spent, self._first, self._step = math.inf, 1.0, 0
        self._shown = math.inf

    def begin(self, model: nn.Module, steps: int) -> None:
        """Counts what is spent before the first step."""
        self._steps, self._every = steps, max(1, steps // _COUNTS)
        self._first = self._spent = self.count()

    def penalty(self, step: int) -> Tensor:
        """Price times the mean bits of a weight, which lie on lines between whole numbers."""
        total = sum(
            _between(form.levels(), classes, self._tables).sum()
            for form, classes in zip(self._forms, self._classes, strict=True)
        )
        assert isinstance(total, Tensor)
        return self.price * total / self._size

    def after(self, step: int) -> None:
        """Counts anew from time to time, and sets the price."""
        self._step = step + 1
        if self._step % self._every and self._step != self._steps:
            return
        self._spent = self.count()
        if self._step < _HOLD * self._steps or self._spent > self._bits:
            ratio = self._spent / self.goal(self._step)
            self.price = min(self.price * min(max(ratio, 0.8), 1.25) ** 0.5, _MOST)

    def goal(self, step: int) -> float:
        """Bits of a weight after `step`: from what they were, by equal shares, to the goal."""
        gone = min(1.0, step / max(1.0, _RAMP * self._steps))
        return self._first * math.pow(self._bits / self._first, gone)

    def count(self) -> float:
        """Bits that a weight takes now; tables and classes follow."""
        spent, counts, found = self._counted()
        device = self._forms[0].latent.device
        tables = torch.from_numpy(rates.bits_of(counts)[::2].copy())
        self._tables = tables.to(device)
        self._classes = [torch.from_numpy(c).long().to(device) for _, c in found]
        return spent

    def _counted(self) -> tuple[float, Any, list[Any]]:
        """Bits of a weight, how often each code occurs, and codes with their classes."""
        found = []
        for form in self._forms:
            levels = form.levels().detach().float().cpu().numpy()
            codes = form.levels().detach().round().to(torch.int32).cpu().numpy()
            found.append((codes, rates.classes_of(levels, 1)))
        counts = rates.count(found, 1)
        return rates.estimate(found, counts) / self._size, counts, found

    def enforce(self) -> None:
        """Counts what is about to be judged, which may be an average."""
        self._shown = self._counted()[0]

    @property
    def settled(self) -> bool:
        """Whether what is shown spends no more bits than were asked for."""
        return self._shown <= _MISSED * self._bits

    def state(self) -> dict[str, Any]:
        """Price and counts."""
        return {
            "price": self.price,
            "spent": self._spent,
            "shown": self._shown,
            "first": self._first,
            "step": self._step,
            "tables": self._tables,
            "classes": [each.to(torch.uint8) for each in self._classes],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        device = self._forms[0].latent.device
        self.price, self._spent, self._shown = state["price"], state["spent"], state["shown"]
        self._first, self._step = state["first"], state["step"]
        self._tables = state["tables"].to(device)
        self._classes = [each.long().to(device) for each in state["classes"]]


def freeze(sites: Sequence[Site]) -> None:
    """Codes in place of what was trained; they give the same."""
    for site in sites:
        site.hold(rounded(site).freeze())


def rounded(site: Site) -> Rounded:
    """The form of a site that is trained."""
    form = site.form
    assert isinstance(form, Rounded)
    return form


def start(site: Site) -> Rounded:
    """Holds a weight or vector as one to be trained; what was pruned gets no gradient."""
    sparse = released(site) if site.form is not None else None
    weight = site.weight
    size = float(weight.float().square().mean().sqrt()) or 1.0
    # Of vectors around their mean: all of them may be moved by as much.
    apart = float(weight.float().std(correction=0)) if weight.dim() == 1 else size
    spread = max(apart, 1e-3 * size)
    axis, fine = (site.axis, _FINE) if weight.dim() > 1 else (None, _FINER)
    form = Rounded.encode(weight, step=spread / fine, axis=axis)
    if sparse is not None:
        kept = form.latent.detach() != 0
        form.latent.register_hook(lambda slope: slope * kept.to(slope.device))  # type: ignore[no-untyped-call]
    site.hold(form)
    return form


def _between(levels: Tensor, classes: Tensor, tables: Tensor) -> Tensor:
    """Bits of levels, on lines between those of whole numbers. tables: (classes, magnitudes)"""
    size = levels.abs().clamp(max=tables.shape[1] - 1.001)
    below = size.detach().floor()
    place = classes * tables.shape[1] + below.long()
    flat = tables.reshape(-1)
    low, high = flat[place], flat[place + 1]
    return low + (size - below) * (high - low)
