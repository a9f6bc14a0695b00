"""Static quantization: int8 weights and activations on grids that calibration inputs have fixed.

For speed as well as size: runtimes multiply such networks in integers, and convolutional ones stay
in integers from layer to layer. Needs a few hundred unlabelled inputs and no training. Around
linear layers only their inputs are rounded; softmax, norms and residual sums stay float, because
rounding them all ruins transformers, which want `transform.smooth` before. Without data use
`quantize.dynamic`; for size alone `quantize.rtn`.

Source: Jacob et al. 2018, arXiv:1712.05877; observers as compared by Wu et al. 2020,
arXiv:2004.09602; falling back to float for the worst layers as in its section 6.2.
Differs from the papers: what falls back is what a measured divergence asks for, not accuracy; one
zero point per activation, so that ranges need not be symmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import nn

from tersor.errors import OptionError, TaskError
from tersor.forms import Form
from tersor.forms.grid import Grid
from tersor.measure.flow import watch
from tersor.methods.fallback import Judge, fall_back
from tersor.methods.observing import Observer, observe
from tersor.methods.placing import Spot, spots
from tersor.methods.quantize.rtn import int8
from tersor.recipe import Outcome, method
from tersor.surgery.fold import fold
from tersor.surgery.grids import grids, put
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Inputs, Task


@method
def static(
    model: nn.Module,
    task: Task | None = None,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 8,
    observer: Observer = "mse",
    samples: Annotated[int, Field(ge=1)] = 512,
    fallback: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Stores every weight as int8 codes and puts activations on grids, in place.

    bits: bits per activation, 2 to 8
    observer: how a range is read from the histogram of what was seen: "minmax" clips nothing,
        "percentile" 0.01 % of the values, "mse" and "entropy" what costs least error or divergence
    samples: calibration inputs to use, at most
    fallback: share of the divergence to get rid of by leaving the layers that cause most of it in
        float; 0 measures nothing and leaves none
    include, exclude: patterns on names and types, see `walk`

    Batch norms are folded first. Weights that a form codes already stay as they are; a pruned layer
    keeps its zeros. Layers that are not called as such (attention of torch computes with its
    weights itself, as do recurrent and embedding layers) have no grids.

    The step's outcome holds the number of grids and of folded norms; where there are such, names of
    layers without grids, of channels that were zero for all inputs ("dead"), and of layers that
    fell back to float, with the divergence before and after that. Raises TaskError without inputs,
    ModelError where an activation is not finite, OptionError where nothing can be quantized or has
    been already.
    """
    if task is None:
        raise TaskError("quantize.static needs inputs to find ranges with; pass a task")
    _check_new(model)
    chosen = walk(model, include, exclude)
    layers = {layer: site.name for site in chosen for layer, _ in site.uses}
    judge = Judge.of(model, task, samples) if fallback else None
    example = task.example(2)
    folded = fold(model, example, only=layers).pairs
    found = spots(watch(model, lambda: task.predict(model, example)), layers)
    if not found:
        raise OptionError(
            f"include={include!r} and exclude={exclude!r} leave no linear layer or convolution of "
            f"{type(model).__name__} that is called in a forward pass; use quantize.rtn for weights"
        )
    plain = {site.name: _stored(site) for site in chosen}
    for site in chosen:
        int8(site)
    placed, dead = _calibrated(model, task, task.calibration(samples), found, observer, bits)
    outcome: Outcome = {"grids": len(found), "folded": len(folded)}
    outcome |= {"dead": dead} if dead else {}
    gridded = {layer for spot in found for layer in spot.layers}
    bare = [name for layer, name in layers.items() if layer not in gridded]
    outcome |= {"without_grids": bare} if bare else {}
    if judge is not None:
        outcome |= fall_back(model, judge, found, placed, chosen, plain, fallback)
    return model, outcome


def _check_new(model: nn.Module) -> None:
    for path, where, _, _ in grids(model):
        raise OptionError(
            f"the {where} of {path!r} is quantized already; start from the original network"
        )


def _stored(site: Site) -> Form | nn.Parameter:
    layer, attribute = site.uses[0]
    return site.form or layer.get_parameter(attribute)


def _calibrated(
    model: nn.Module,
    task: Task,
    batches: Sequence[Inputs],
    found: Sequence[Spot],
    observer: Observer,
    bits: int,
) -> tuple[list[Grid], dict[str, int]]:
    """Puts the grids; returns them, and how many channels of which places were always zero."""
    if not batches:
        raise TaskError("quantize.static finds ranges on calibration inputs and the task has none")
    names = {module: name for name, module in model.named_modules()}
    placed, dead = [], {}
    for spot, observed in zip(found, observe(model, task, batches, found), strict=True):
        grid = observed.grid(observer, bits)
        # Inputs first: a loader puts them in this order, and equal models are to be equal files.
        for layer, where in sorted(spot.places, key=lambda place: place[1]):
            put(layer, where, grid)
        placed.append(grid)
        if observed.dead:
            layer, where = next(iter(spot.places))
            dead[f"{where} of {names[layer]}"] = observed.dead
    return placed, dead
