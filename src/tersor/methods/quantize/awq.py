"""AWQ: channels that carry much get finer steps, by making their weights larger before rounding.

For 4-bit weights in groups that a runtime computes with, where calibration data is little or
another domain than that of use: nothing is fitted to it but one number for each group of layers.
With enough data `quantize.qronos` is better. Networks whose norms stand behind their residual sums
(BERT) have few layers that can take the factors; there it is hardly more than a search for ranges.

Source: Lin et al. 2024 (AWQ), arXiv:2306.00978, eq. 4 and 5, and its code for ranges.
Differs from the paper: an input's size is its root mean square and not its mean magnitude, errors
are computed from second moments, and a group whose best factor is 1 stays as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import TaskError
from tersor.forms.form import rows
from tersor.measure.flow import watch
from tersor.methods.calibrated import affine, check_zeros
from tersor.methods.columns import Levels, Problem
from tersor.methods.groups import Group, groups_of
from tersor.methods.layerwise import Layer, layers_of
from tersor.methods.moments import Metric
from tersor.methods.ranges import levels_for
from tersor.methods.rescaling import (
    TOLERANCE,
    Unchanged,
    movable,
    multiply_inputs,
    multiply_outputs,
)
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task

_ALPHAS = tuple(step / 20 for step in range(20))


@method
def awq(
    model: nn.Module,
    task: Task | None = None,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 4,
    group_size: Annotated[int, Field(ge=1)] | None = 64,
    symmetric: bool = True,
    samples: Annotated[int, Field(ge=1)] = 128,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Stores every weight of two or more dimensions as `bits`-bit codes, in place.

    bits: bits per weight, 2 to 8
    group_size: inputs that share one scale; None for one scale per output channel
    symmetric: levels -top..top times the scale; otherwise with a zero point
    samples: calibration inputs to use, at most
    include, exclude: patterns on names and types, see `walk`; a linear layer that takes factors
        must be chosen too

    The step's outcome holds the number of groups of layers whose factors were folded, and the
    relative change of the outputs by that alone. Raises as `quantize.gptq` does.
    """
    if task is None:
        raise TaskError("quantize.awq needs inputs to run the network on; pass a task")
    sites = walk(model, include, exclude)
    check_zeros(sites, symmetric)
    found = layers_of(model, task, sites, samples=samples)
    unchanged = Unchanged(model, task)
    folded = 0
    for group in _groups(model, task, found):
        here = [each for each in found if each.site.uses[0][0] in group.layers]
        factor = _best_factor(here, bits, group_size, symmetric)
        if factor is not None and _fold(group, factor, unchanged):
            folded += 1
            found = [_scaled(each, factor) if each in here else each for each in found]
    error = unchanged.check("quantize.awq")
    for layer in found:
        matrix = rows(layer.site.weight, layer.site.axis).float()
        layer.site.hold(
            affine(
                replace(layer, matrix=matrix),
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                choose=_nearest,
            )
        )
    return model, {"folded": folded, "error": error}


def _groups(model: nn.Module, task: Task, found: list[Layer]) -> list[Group]:
    """Those whose factors something before them can take."""
    chosen = {layer.site.uses[0][0] for layer in found if layer.moments is not None}
    free = movable(model, set(model.modules()))
    flow = watch(model, lambda: task.predict(model, task.example(2)))
    return [g for g in groups_of(flow, chosen & free, free) if g.absorber is not None]


def _fold(group: Group, factor: Tensor, unchanged: Unchanged) -> bool:
    """Moves the factors, unless the network then answers otherwise."""
    assert group.absorber is not None
    for sign, power in ((1, factor), (-1, 1 / factor)):
        multiply_outputs(group.absorber, 1 / power)
        for layer in group.layers:
            multiply_inputs(layer, power)
        if sign > 0 and unchanged.error() <= TOLERANCE:
            return True
    return False


def _best_factor(
    layers: list[Layer], bits: int, group_size: int | None, symmetric: bool
) -> Tensor | None:
    """(inputs,), of the least error of all layers together; None where 1 is best."""
    moments = layers[0].moments
    assert moments is not None
    size = moments.own[0].diagonal().sqrt()
    usable = size > 0
    best, least = None, torch.inf
    for alpha in _ALPHAS:
        factor = torch.where(usable, size, 1.0) ** alpha
        factor = factor / (factor.max() * factor.min()).sqrt()
        error = 0.0
        for layer in layers:
            scaled = _scaled(layer, factor)
            assert scaled.moments is not None
            problem = Problem(scaled.matrix, Metric(scaled.moments.own[0]), scaled.zeros)
            levels = levels_for(problem, bits, group_size, symmetric)
            codes, _ = _nearest(problem, levels)
            error += float(problem.error(levels.dense(codes)).sum())
        if error < least:
            best, least = (factor if alpha else None), error
    return best


def _scaled(layer: Layer, factor: Tensor) -> Layer:
    """The layer once its inputs are divided by the factor and its weight is multiplied."""
    moments = layer.moments
    assert moments is not None
    own = moments.own / (factor[:, None] * factor)
    return replace(layer, matrix=layer.matrix * factor, moments=replace(moments, own=own))


def _nearest(problem: Problem, levels: Levels) -> tuple[Tensor, Levels]:
    return levels.nearest(problem.target, problem.zeros), levels
