"""What calibration inputs tell of a network's weights: what an error in each of them does.

An error in one column can be made up for in later columns, since inputs resemble each other, and in
later rows, since gradients do. What is left of a weight's curvature then says how finely it must be
stored. Where no gradient passes, errors are weighed against what the layer gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import Dense
from tersor.forms.form import rows
from tersor.measure import evaluating, reference_outputs, swapped
from tersor.measure.channels import channels, norms_of
from tersor.measure.curvature import Curvature, GradientError, curvature
from tersor.methods.moments import unit_lower
from tersor.methods.norms import Original
from tersor.surgery.walk import Site
from tersor.task import Inputs, Task

Array = np.ndarray[Any, np.dtype[Any]]

# Shares of the mean energy that are added to each input's own (as in GPTQ) and each output's own.
# Gradients are drawn, so their moments are noisier.
_ALONG, _ACROSS = 0.01, 0.05


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
class Known:
    """What was found out about a network, by the names of its weights and vectors.

    samples: calibration inputs that were used, at most
    marks: of a weight, its shape and the sum of its values, by which it is known again
    effects: of a weight, for each group of outputs, along its inputs and across its outputs
    left: of a weight, the mean curvature that feedback does not make up for
    own: of a vector, its mean curvature, 0 where none is known
    blind: weights that matter although no gradient says how much
    reason: why there were no gradients at all; empty where there were
    original: what batch norms saw and what was answered; None without batch norms, or held-out
        inputs
    """

    samples: int
    marks: dict[str, tuple[tuple[int, ...], float]] = field(default_factory=dict)
    effects: dict[str, list[tuple[Effect, Effect]]] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    blind: list[str] = field(default_factory=list)
    reason: str = ""
    original: Original | None = None


def learn(
    model: nn.Module, task: Task, sites: Sequence[Site], vectors: Sequence[Site], samples: int
) -> Known:
    """Looks at every weight and vector, all of them plain. Raises ModelError for NaN outputs."""
    batches, everything, found = task.calibration(samples), [*sites, *vectors], Known(samples)
    try:
        curved = curvature(model, task, batches, everything)
    except GradientError as error:
        found.reason = str(error)
        curved = curvature(model, task, batches, everything, draws=0)
    found.blind = [
        site.name
        for site in sites
        if not curved[site.name].own and (found.reason or _matters(model, task, batches[0], site))
    ]
    own = _guessed(sites, curved, found.blind) if found.blind else {}
    found.marks = {site.name: _mark(site) for site in sites}
    for site in sites:
        # Moments are large: those of each weight go as soon as their effects are known.
        curve = curved.pop(site.name)
        shape = (site.weight.shape[site.axis], site.weight.numel() // site.weight.shape[site.axis])
        found.effects[site.name] = effects(shape, curve)
        kept = np.mean([along.kept * across.kept for along, across in found.effects[site.name]])
        found.left[site.name] = own.get(site.name, curve.own) * float(kept)
    found.own = {vector.name: curved[vector.name].own for vector in vectors}
    held_out = task.holdout(samples) if norms_of(model) else []
    if held_out:
        answers = reference_outputs(model, task, held_out)
        found.original = Original(channels(model, task, batches), answers)
    return found


def check_known(known: Known, sites: Sequence[Site]) -> None:
    """Raises OptionError for a weight that it is not of."""
    for site in sites:
        if known.marks.get(site.name) != _mark(site):
            raise OptionError(
                f'known= is of another network: "{site.name}" of shape '
                f"{tuple(site.weight.shape)} is not what was looked at; look at this one"
            )


def _mark(site: Site) -> tuple[tuple[int, ...], float]:
    return tuple(site.weight.shape), float(site.weight.double().sum())


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
    # From the last to the first, as `unit_lower` counts; with columns over their own, U is the
    # inverse of the factor.
    lower, pivots = unit_lower(damped.flip(0, 1))
    upper = lower.flip(0, 1)
    eye = torch.eye(len(wide), dtype=torch.float64)
    feedback = torch.linalg.solve_triangular(upper, eye, upper=True, unitriangular=True)
    weights = pivots.flip(0)
    return Effect(
        (weights / weights.mean()).float().numpy(),
        feedback.T.tril(-1).contiguous().float().numpy(),
        float(weights.mean() / damped.diagonal().mean()),
    )


def relative_curvature(matrix: Tensor, moments: Tensor | None) -> float:
    """How the relative squared error of what a layer gives curves in each element of its weight.

    matrix: (outputs, inputs); moments: (groups, inputs, inputs) of what it is multiplied with,
        None for inputs of one energy that do not resemble each other
    """
    wide = matrix.double()
    if moments is None:
        return 1 / max(float(wide.square().sum()), 1e-300)
    grouped = wide.reshape(len(moments), -1, wide.shape[1])
    given = ((grouped @ moments) * grouped).sum()
    return float(moments.diagonal(dim1=1, dim2=2).mean()) / max(float(given), 1e-300)


def _sides(moments: Tensor | None, groups: int, size: int, damping: float) -> list[Effect]:
    if moments is None:
        return [Effect(np.ones(size, np.float32))] * groups
    return [effect_of(matrix, damping) for matrix in moments]


def _matters(model: nn.Module, task: Task, inputs: Inputs, site: Site) -> bool:
    """Whether the answers change with a weight that no gradient speaks of."""
    noise = torch.randn(site.weight.shape, generator=torch.Generator().manual_seed(0))
    other = site.weight + noise.to(site.weight) * site.weight.float().std(correction=0)
    with evaluating(model):
        before = task.predict(model, inputs)
        with swapped(site, Dense(other, other.dtype)):
            return not torch.equal(task.predict(model, inputs), before)


def _guessed(
    sites: Sequence[Site], curved: dict[str, Curvature], blind: Sequence[str]
) -> dict[str, float]:
    """Curvature of the blind weights from their inputs, in the units of the gradients of others."""
    relative = {
        site.name: relative_curvature(rows(site.weight, site.axis).cpu(), curved[site.name].inputs)
        for site in sites
    }
    shares = [curved[name].own / relative[name] for name in relative if name not in blind]
    unit = float(np.median([share for share in shares if share > 0] or [1.0]))
    return {name: unit * relative[name] for name in blind}
