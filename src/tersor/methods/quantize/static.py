"""Static quantization: int8 weights and activations on grids that calibration inputs have fixed.

For speed as well as size: runtimes multiply such networks in integers, and convolutional ones stay
in integers from layer to layer. Needs a few hundred unlabelled inputs and no training. Around linear
layers only their inputs are rounded; softmax, norms and residual sums stay float, because rounding
them all ruins transformers. Without data use `quantize.dynamic`; for size alone `quantize.rtn`.

Source: Jacob et al. 2018, arXiv:1712.05877; observers as compared by Wu et al. 2020,
arXiv:2004.09602; falling back to float for the worst layers as in its section 6.2.
Differs from the papers: what falls back is what a measured divergence asks for, not accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import nn

from tersor.errors import OptionError, TaskError
from tersor.forms import Affine
from tersor.measure.flow import watch
from tersor.methods.observing import Observer, observe
from tersor.methods.placing import Spot, spots
from tersor.methods.quantize.rtn import encode
from tersor.methods.sparse import sparse_form
from tersor.recipe import Outcome, method
from tersor.surgery.fold import fold
from tersor.surgery.grids import grids, put
from tersor.surgery.walk import Patterns, Site, check_finite, walk
from tersor.task import Task


@method
def static(
    model: nn.Module,
    task: Task | None = None,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 8,
    observer: Observer = "mse",
    samples: Annotated[int, Field(ge=1)] = 256,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """x"""
    if task is None:
        raise TaskError("quantize.static needs inputs to find ranges with; pass a task")
    placed = next(grids(model), None)
    if placed is not None:
        raise OptionError(f"{placed[0]!r} has a grid on its {placed[1]} already")
    check_finite(model)
    layers = {layer for site in walk(model, include, exclude) for layer, _ in site.uses}
    example = task.example(2)
    fold(model, example, only=layers)
    found = spots(watch(model, lambda: task.predict(model, example)), layers)
    for site in walk(model, include, exclude):
        site.hold(encode(site, bits=8, group_size=None, symmetric=True, axis=site.axis))
    batches = task.calibration(samples)
    seen = observe(model, task, batches, found)
    for spot, observed in zip(found, seen, strict=True):
        grid = observed.grid(observer, bits)
        for layer, where in sorted(spot.places, key=lambda place: place[1]):
            put(layer, where, grid)
    return model, {}
