"""SmoothQuant: loud channels of activations are made quieter, and the weights they meet louder.

The network computes the same. For transformers before `quantize.static`: a few channels of what
enters a linear layer are tens of times as large as the rest, and a grid wide enough for them is
coarse for all others. The factors
go into the norm or linear layer before, where that is exact; elsewhere the layer's input is
multiplied by them, which costs one multiplication a value. Nothing to gain for weights alone. For
convolutional networks use `transform.equalize`.

Source: Xiao et al. 2023 (SmoothQuant), arXiv:2211.10438, eq. 3-4.
Differs from the paper: alpha is chosen for each group of layers by the error of its output; where
no layer before takes the factors the input is multiplied, so that post-norm transformers profit.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.forms import Affine
from tersor.forms.grid import Grid
from tersor.forms.scaling import Scaling
from tersor.measure.flow import watch
from tersor.methods.groups import Group, groups_of
from tersor.methods.rescaling import (
    TOLERANCE,
    Unchanged,
    by_inputs,
    movable,
    multiply_inputs,
    multiply_outputs,
)
from tersor.methods.seeing import Rows, inputs_of
from tersor.recipe import Outcome, method, recipe_of
from tersor.surgery.grids import grids, put_scaling
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_MOST = 1e4


@method
def smooth(
    model: nn.Module,
    task: Task | None = None,
    *,
    multiply: bool = True,
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Moves the loudness of channels from the inputs of linear layers into their weights, in place.

    multiply: multiply a layer's input where nothing before it can take the factors; otherwise such
        layers are left alone
    samples: calibration inputs to use, at most; what only a few of them are loud in counts, too
    include, exclude: patterns on names and types, see `walk`; a linear layer that takes factors
        must be chosen too

    Alpha is tried from 0.3 to 0.9 for each group of layers that are fed the same tensor, on 8-bit
    weights and activations, and the group left alone where none lowers the error of its output. The
    step's outcome holds the number of groups whose factors were folded, multiplied in, and that
    were left alone, and the relative change of the outputs. Raises OptionError where there is no
    linear layer to smooth, TaskError without a task.
    """
    if task is None:
        raise TaskError("transform.smooth looks at what enters linear layers; pass a task")
    smoothed = any(step.method == "transform.smooth" for step in recipe_of(model).steps)
    if smoothed or next(grids(model), None):
        raise OptionError(
            "inputs of this network are smoothed or on grids already; start from the original"
        )
    layers = {layer for site in walk(model, include, exclude) for layer, _ in site.uses}
    free = movable(model, set(model.modules()))
    unchanged, example = Unchanged(model, task), task.example(2)
    flow = watch(model, lambda: task.predict(model, example))
    groups = groups_of(flow, layers & free, free)
    if not groups:
        raise OptionError(
            f"{type(model).__name__} has no linear layer with a plain weight of its own among "
            "those chosen; smooth before quantizing, or leave this step out"
        )
    seen = inputs_of(model, task, task.calibration(samples), [g.layers[0] for g in groups])
    done = {"folded": 0, "multiplied": 0, "left": 0}
    for group in groups:
        done[_smoothed(group, seen[group.layers[0]], unchanged, multiply)] += 1
    return model, {**done, "error": unchanged.check("transform.smooth")}


def _smoothed(group: Group, rows: Rows, unchanged: Unchanged, multiply: bool) -> str:
    """What became of a group: folded, multiplied or left."""
    factor = _best_factor(group.layers, rows)
    if factor is None:
        return "left"
    if group.absorber is not None:
        multiply_outputs(group.absorber, 1 / factor)
        for layer in group.layers:
            multiply_inputs(layer, factor)
        if unchanged.error() <= TOLERANCE:
            return "folded"
        # A norm that computes with its weight in a way of its own, say.
        multiply_outputs(group.absorber, factor)
        for layer in group.layers:
            multiply_inputs(layer, 1 / factor)
    if not multiply:
        return "left"
    scaling = Scaling(1 / factor)
    for layer in group.layers:
        multiply_inputs(layer, factor)
        put_scaling(layer, scaling)
    return "multiplied"


def _best_factor(layers: list[nn.Module], rows: Rows) -> Tensor | None:
    """(inputs,) what weights are multiplied by; None where it is best to leave them."""
    weights = [by_inputs(layer)[0, :, :, 0] for layer in layers]
    loudest = weights[0].new_zeros(weights[0].shape[1])
    for weight in weights:
        loudest = loudest.maximum(weight.abs().amax(0))
    best, least = None, _error(weights, rows, loudest.new_ones(len(loudest)))
    for alpha in ALPHAS:
        factor = rows.largest**alpha / loudest ** (1 - alpha)
        usable = (rows.largest > 0) & (loudest > 0)
        factor = factor.where(usable, factor.new_ones(())).clamp(1 / _MOST, _MOST)
        error = _error(weights, rows, factor)
        if error < least:
            best, least = factor, error
    return best


def _error(weights: list[Tensor], rows: Rows, factor: Tensor) -> float:
    """Squared error of the products in 8 bits, on a grid for all that was ever seen."""
    grid = Grid.spanning(float((rows.low / factor).min()), float((rows.high / factor).max()))
    grid.to(factor.device)
    rounded = grid(rows.some / factor)
    total = 0.0
    for weight in weights:
        coded = Affine.encode(weight * factor, bits=8).dense()
        total += float((rounded @ coded.T - rows.some @ weight.T).square().sum())
    return total
