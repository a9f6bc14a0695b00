"""Trellis-coded quantization: rotated weights as rings of a bit-shift trellis, at 1 to 4 bits.

For 2 and 3 bits, where codes for one weight at a time lose too much; at 4 bits its lead over
`quantize.gptq` is small. Every weight takes exactly `bits` bits, and each output a scale, which
`recover.scales` may train afterwards: at 2 bits it should. Reading a weight takes longer than from
other codes, and no runtime multiplies with them: choose it where bytes count. For the smallest file
after entropy coding see `quantize.entropy`.

Source: Tseng et al. 2024 (QTIP), arXiv:2406.11235, algorithms 1, 4 and section 4.
Differs from the paper: rings run down single columns where they can, so that errors are fed forward
after every column; each layer is calibrated on the layers quantized before it; no fine-tuning.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from tersor.errors import OptionError
from tersor.forms import Form, Rotated
from tersor.forms.form import rows
from tersor.forms.rotated import turn, turn_both
from tersor.methods.columns import Problem
from tersor.methods.layerwise import Layer, layerwise
from tersor.methods.ldlq import Code, encode
from tersor.methods.sparse import check_uncoded
from tersor.recipe import method
from tersor.surgery.hold import hold
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task


@method
def trellis(
    model: nn.Module,
    task: Task | None = None,
    *,
    bits: Annotated[int, Field(ge=1, le=4)] = 2,
    state_bits: Annotated[int, Field(ge=8, le=16)] = 16,
    samples: Annotated[int, Field(ge=1)] = 128,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight of two or more dimensions as trellis codes of its rotation, in place.

    bits: bits per weight, 1 to 4
    state_bits: how many bits say a value, 8 to 16; one more halves the speed and lessens the error
    samples: calibration inputs to use, at most; without a task the weights themselves count
    generator: draws the rotations; a recipe notes its seed
    include, exclude: patterns on names and types, see `walk`

    Raises OptionError for a weight that is pruned or quantized already, ModelError for weights
    or calibration inputs that are not finite.
    """
    sites = walk(model, include, exclude)
    check_uncoded(sites)
    for site in sites:
        if site.form is not None:
            raise OptionError(
                f'"{site.name}" of shape {tuple(site.weight.shape)} is pruned, and a rotation '
                f'would fill its zeros; use quantize.rtn, or exclude="{site.name}"'
            )
    seeds = torch.randint(2**31, (len(sites),), generator=generator).tolist()
    seed_of = {site.name: seed for site, seed in zip(sites, seeds, strict=True)}
    code = Code(bits, state_bits)

    def quantize(layer: Layer) -> Form:
        return rotated(layer, code, seed_of[layer.site.name])

    if task is None:
        for site in sites:
            site.hold(quantize(Layer(site, _matrix(site))))
    else:
        layerwise(model, task, sites, quantize, samples=samples, original=True)
    return model


def rotated(layer: Layer, code: Code, seed: int) -> Rotated:
    """The weight of a layer as trellis codes, with errors fed forward where moments are known."""
    site, matrix, moments = layer.site, layer.matrix, None
    if layer.moments is not None:
        # Rotations mix the outputs of all groups of a convolution.
        own, cross = layer.moments.own.mean(0), layer.moments.cross
        problem = Problem.of(matrix, own, None if cross is None else cross.mean(0))
        matrix = problem.target
        moments = turn(turn(problem.metric.own, 2 * seed + 1).T, 2 * seed + 1)
        moments.diagonal().add_(problem.metric.extra)
    inner = encode(turn_both(matrix, seed), moments, code)
    form = Rotated(
        inner.dense(), seed=seed, axis=site.axis, shape=site.weight.shape, dtype=site.weight.dtype
    )
    hold(form, "turned", inner)
    return form


def _matrix(site: Site) -> torch.Tensor:
    return rows(site.weight, site.axis).float()
