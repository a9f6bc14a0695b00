"""Each weight as the search for its codes sees it: its effects, its zeros and its step.

Steps follow from what feedback leaves of each weight's curvature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.forms import Trellis
from tersor.forms.form import rows
from tersor.forms.trellis import narrowest
from tersor.measure.curvature import Curvature
from tersor.methods import rates
from tersor.methods.effects import Effect, Known, check_known, effects, learn
from tersor.methods.search import Terms, search
from tersor.methods.sparse import check_uncoded, released
from tersor.surgery.walk import Site
from tersor.task import Task

Array = np.ndarray[Any, np.dtype[Any]]

# How much of a curvature is believed where weights are compared: it holds for small errors only.
_TRUST = 0.75


@dataclass
class Weight:
    """One weight as the search sees it.

    matrix: (outputs, inputs) float32
    effects: for each group of outputs, along its inputs and across its outputs
    zeros: (outputs, inputs), 1 where the weight was pruned; None if it was not
    step: relative to those of the other weights
    """

    site: Site
    matrix: Array
    effects: list[tuple[Effect, Effect]]
    zeros: Array | None = None
    step: float = 1.0

    def codes(self, step: float, *, states: int, bits: Array, rate: float) -> tuple[Array, Array]:
        """(codes, classes), both (outputs, inputs). bits, rate: as in `Terms`"""
        levels = (self.matrix / step).astype(np.float32)
        classes = rates.classes_of(levels, states)
        found = []
        for group, (along, across) in enumerate(self.effects):
            part = slice(*(len(levels) * at // len(self.effects) for at in (group, group + 1)))
            terms = Terms(
                along.weights, along.feedback, across.weights, across.feedback, bits, rate
            )
            zeros = None if self.zeros is None else self.zeros[part]
            codes, _ = search(levels[part], classes[part], terms, states=states, zeros=zeros)
            found.append(codes)
        return np.concatenate(found), classes

    def form(self, codes: Array, step: float, *, states: int) -> Trellis:
        """What holds the weight then."""
        weight = self.site.weight
        return Trellis(
            narrowest(torch.from_numpy(codes)).to(weight.device),
            torch.full((1, 1), step, dtype=torch.float32, device=weight.device),
            states=states,
            axis=self.site.axis,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
        )


@dataclass
class Vector:
    """One one-dimensional tensor. step: relative to those of the weights, None where unknown"""

    site: Site
    step: float | None = None

    def form(self, step: float, bits: float) -> Trellis:
        """Its elements rounded to a grid. step, bits: of the weights"""
        values = self.site.weight
        if self.step is None:
            # Of the middle one: a channel that is never used may have a scale beyond all others.
            middle = float(values.abs().median()) or float(values.abs().max()) or 1.0
            step = middle / 2 ** min(max(bits + 3, 6), 12)
        else:
            step *= self.step
        least = float(values.abs().max()) / 2**20
        return Trellis.encode(values, step=max(step, least), axis=None)


@dataclass
class Survey:
    """Everything to be stored, and what is known of it; nothing is without a task."""

    weights: list[Weight]
    vectors: list[Vector]
    known: Known | None = None


def survey(
    model: nn.Module,
    task: Task | None,
    sites: Sequence[Site],
    vectors: Sequence[Site],
    samples: int,
    known: Known | None = None,
) -> Survey:
    """Looks at every weight and vector. Without a task, steps are those of `blind_step`.

    samples: calibration inputs to use, at most
    known: what was learned of the same network and task before; of other samples it is no use
    """
    check_uncoded(sites)
    found = Survey([_weight(site) for site in sites], [Vector(site) for site in vectors])
    if task is None:
        for weight in found.weights:
            weight.step = blind_step(_rms(weight.matrix), weight.matrix.size)
        return found
    if known is None or known.samples != samples:
        known = learn(model, task, sites, vectors, samples)
    check_known(known, sites)
    found.known = known
    for weight in found.weights:
        weight.effects = known.effects[weight.site.name]
    middle = _set_steps(found.weights, [known.left[weight.site.name] for weight in found.weights])
    for vector in found.vectors:
        own = known.own[vector.site.name]
        if own > 0 and middle > 0:
            # A lone grid's error is 1/12 of its step squared, a trellis's 1/4.
            vector.step = math.sqrt(3 * middle / own)
    return found


def plain_weight(name: str, matrix: Tensor, step: float = 1.0) -> Weight:
    """A weight of no model, (outputs, inputs), of which nothing is known but its values."""
    found = np.ascontiguousarray(matrix.float().cpu().numpy())
    return Weight(Site(name, "", 0, ()), found, effects(found.shape, Curvature(0.0)), step=step)


def blind_step(rms: float, size: int) -> float:
    """Step of a weight of which only the values are known, relative to those of others.

    Were a relative error in any weight as bad as in any other, the step would be proportional to
    rms * sqrt(size): more bits for the few. Taking the root of the scale, half way to one step for
    all, is nearer to what networks want; docs/design/decisions.md has the figures.

    size: its elements
    """
    return math.sqrt((rms or 1.0) * size)


def _rms(matrix: Array) -> float:
    return float(np.sqrt(np.square(matrix, dtype=np.float64).mean()))


def _weight(site: Site) -> Weight:
    # Curvature is that of a plain parameter.
    pruned = released(site) is not None
    found = np.ascontiguousarray(rows(site.weight.float(), site.axis).cpu().numpy())
    zeros = (found == 0).astype(np.uint8) if pruned else None
    return Weight(site, found, effects(found.shape, Curvature(0.0)), zeros)


def _set_steps(weights: list[Weight], curvatures: list[float]) -> float:
    """Steps for which one more bit would buy each weight the same; returns step^2 * curvature."""
    sizes = np.array([weight.matrix.size for weight in weights])
    # A weight that nothing depends on gets the coarsest step of the others.
    least = min((c for c in curvatures if c > 0), default=1.0)
    logs = -0.5 * np.log(np.maximum(curvatures, least))
    middle = float((sizes * logs).sum() / sizes.sum())
    for weight, log in zip(weights, logs, strict=True):
        weight.step = math.exp(_TRUST * (float(log) - middle))
    return math.exp(-2 * middle)
