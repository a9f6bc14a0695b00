"""What must be known of each weight before its codes can be chosen: what errors do, and its step.

Both follow from the curvature of the task's divergence. An error in one column can be made up for
in later columns, since inputs resemble each other, and in later rows, since gradients do; how
finely a weight must be stored depends on what is left of its curvature then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import Trellis
from tersor.forms.form import rows
from tersor.forms.trellis import narrowest
from tersor.measure.curvature import Curvature, curvature
from tersor.methods import rates
from tersor.methods.search import Terms, search
from tersor.methods.sparse import sparse_form
from tersor.surgery.hold import bake, release
from tersor.surgery.walk import Site
from tersor.task import Task

Array = np.ndarray[Any, np.dtype[Any]]

# Shares of the mean energy that are added to each input's own (as in GPTQ) and each output's own.
# Gradients are drawn, so their moments are noisier.
_ALONG, _ACROSS = 0.01, 0.5
# How much of a curvature is believed where weights are compared: it holds for small errors only.
_TRUST = 0.5
# Vectors are few: an error a quarter of what pays makes theirs next to nothing at 1 bit more each.
_FINER = 1.5


@dataclass(frozen=True)
class Effect:
    """What errors do along one side of a weight: feedback and weights of `Terms`.

    weights: with a mean of 1
    kept: mean of the weights against that of the curvature itself; what feedback cannot make up for
    """

    weights: Array
    feedback: Array | None = None
    kept: float = 1.0


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
            return Trellis.encode(values, step=middle / 2 ** min(max(bits + 3, 6), 12), axis=None)
        largest = float(values.abs().max())
        return Trellis.encode(values, step=max(step * self.step, largest / 2**20), axis=None)


@dataclass
class Survey:
    """Everything to be stored, and what is known of it."""

    weights: list[Weight]
    vectors: list[Vector] = field(default_factory=list)


def survey(
    model: nn.Module,
    task: Task | None,
    sites: Sequence[Site],
    vectors: Sequence[Site],
    samples: int,
) -> Survey:
    """Looks at every weight and vector. Without a task, steps are those of `blind_step`."""
    found = Survey([_weight(site) for site in sites], [Vector(site) for site in vectors])
    if task is None:
        for weight in found.weights:
            weight.step = blind_step(_rms(weight.matrix), weight.matrix.size)
        return found
    curved = curvature(model, task, task.calibration(samples), [*sites, *vectors])
    left = []
    for weight in found.weights:
        curve = curved[weight.site.name]
        weight.effects = effects(weight.matrix.shape, curve)
        kept = np.mean([along.kept * across.kept for along, across in weight.effects])
        left.append(curve.own * float(kept))
    middle = _set_steps(found.weights, left)
    for vector in found.vectors:
        own = curved[vector.site.name].own
        if own > 0 and middle > 0:
            # A lone grid's error is 1/12 of its step squared, a trellis's 1/4.
            vector.step = math.sqrt(3 * middle / own) / _FINER
    return found


def plain_weight(name: str, matrix: Tensor, step: float = 1.0) -> Weight:
    """A weight of no model, (outputs, inputs), of which nothing is known but its values."""
    found = np.ascontiguousarray(matrix.float().cpu().numpy())
    return Weight(Site(name, "", 0, ()), found, effects(found.shape, Curvature(0.0)), step=step)


def blind_step(rms: float, size: int) -> float:
    """Step of a weight of which only the values are known, relative to those of others.

    Were a relative error in any weight as bad as in any other, the step would be proportional to
    rms * sqrt(size): more bits for the few. The square root of it, half way to one step for all
    where scales are concerned, is nearer to what networks want; docs/design/decisions.md has the
    figures.

    size: its elements
    """
    return math.sqrt((rms or 1.0) * size)


def effects(shape: tuple[int, ...], curve: Curvature) -> list[tuple[Effect, Effect]]:
    """Of each group, along the inputs and across the outputs of a weight (outputs, inputs)."""
    known = next((len(m) for m in (curve.inputs, curve.outputs) if m is not None), 1)
    outputs, inputs = shape[0] // known, shape[1]
    along = _sides(curve.inputs, known, inputs, _ALONG)
    return list(zip(along, _sides(curve.outputs, known, outputs, _ACROSS), strict=True))


def effect_of(moments: Tensor, damping: float) -> Effect:
    """The effect of errors whose curvature is `moments`, (n, n) and positive semidefinite.

    With the inverse of the damped moments = U^T U, U upper triangular, an error e at i is made up
    for by moving each later j by -e * U_ij / U_ii, and what stays of it costs e^2 / U_ii^2
    (Frantar et al. 2022, arXiv:2210.17323, section 3.3).
    """
    wide = moments.double()
    energy = wide.diagonal().mean().clamp(min=1e-30)
    damped = wide + damping * energy * torch.eye(len(wide), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped))).T
    own = upper.diagonal()
    weights, feedback = own.pow(-2), (upper / own[:, None]).T.tril(-1)
    return Effect(
        (weights / weights.mean()).float().numpy(),
        feedback.contiguous().float().numpy(),
        float(weights.mean() / damped.diagonal().mean()),
    )


def _sides(moments: Tensor | None, groups: int, size: int, damping: float) -> list[Effect]:
    if moments is None:
        return [Effect(np.ones(size, np.float32))] * groups
    return [effect_of(matrix, damping) for matrix in moments]


def _rms(matrix: Array) -> float:
    return float(np.sqrt(np.square(matrix, dtype=np.float64).mean()))


def _weight(site: Site) -> Weight:
    for layer, attribute in site.uses:
        bake(layer, attribute)
    form, matrix = site.form, rows(site.weight.float(), site.axis).cpu()
    if form is not None and sparse_form(form) is not form:
        raise OptionError(
            f'"{site.name}" of shape {tuple(site.weight.shape)} is held as {form.kind} already, '
            "which quantizing again would only worsen; start from the original, or exclude it"
        )
    found = np.ascontiguousarray(matrix.numpy())
    zeros = None if form is None else (found == 0).astype(np.uint8)
    if form is not None:
        # Curvature is that of a plain parameter.
        plain: nn.Parameter | None = None
        for layer, attribute in site.uses:
            plain = release(layer, attribute, plain)
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
