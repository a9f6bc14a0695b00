"""Affine codes chosen with calibration data, layer after layer: what GPTQ and Qronos share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.forms import Affine
from tersor.methods.columns import Levels, Problem, Rounding
from tersor.methods.layerwise import Layer, layerwise
from tersor.methods.moments import Metric
from tersor.methods.ranges import levels_for
from tersor.methods.sparse import keep_zeros
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task

Coding = Callable[[Problem, Levels], tuple[Tensor, Levels]]
"""Chooses codes (outputs, inputs), and the levels that they then stand for."""

_ROUNDS, _SWEEPS = 2, 1
"""Rounds of fitting scales and going over the codes, and sweeps over them in each."""


def affine_layers(
    name: str,
    model: nn.Module,
    task: Task | None,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    samples: int,
    sites: tuple[Patterns, Patterns],
    original: bool,
    codes: Coding | None = None,
) -> nn.Module:
    """Holds each chosen weight as an Affine form.

    name: of the method; sites: include, exclude
    original: whether the outputs of the original are the target
    codes: what chooses them, None for `best_codes`
    """
    if task is None:
        raise TaskError(f"{name} needs inputs to run the network on; pass a task")
    chosen = walk(model, *sites)
    check_zeros(chosen, symmetric)

    def quantize(layer: Layer) -> Affine:
        return affine(
            layer, bits=bits, group_size=group_size, symmetric=symmetric, choose=codes or best_codes
        )

    layerwise(model, task, chosen, quantize, samples=samples, original=original)
    return model


def check_zeros(sites: Sequence[Site], symmetric: bool) -> None:
    """Raises OptionError for pruned weights, where codes with zero points are asked for."""
    for site in sites:
        if site.form is not None and not symmetric:
            raise OptionError(
                f"symmetric=False cannot keep the zeros of the pruned layer {site.name!r} of shape "
                f"{tuple(site.weight.shape)}; use symmetric=True"
            )


def affine(
    layer: Layer, *, bits: int, group_size: int | None, symmetric: bool, choose: Coding
) -> Affine:
    """The codes of one weight, sparse ones where it was pruned."""
    codes, scale, zero = [], [], []
    for part in problems(layer):
        for few in part.split(group_size):
            each, found = choose(few, levels_for(few, bits, group_size, symmetric))
            codes.append(each.to(torch.int8))
            scale.append(found.scale.to(torch.bfloat16))
            zero.append(found.zero.to(torch.int8))
    weight = layer.site.weight
    form = Affine(
        torch.cat(codes),
        torch.cat(scale),
        None if symmetric else torch.cat(zero),
        bits=bits,
        group_size=group_size,
        axis=layer.site.axis,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
    )
    if layer.sparse is not None:
        keep_zeros(form, layer.sparse)
    return form


def problems(layer: Layer) -> list[Problem]:
    """What each group of a weight's outputs should become: one, but for grouped convolutions."""
    if layer.moments is None:
        eye = torch.eye(layer.matrix.shape[1], device=layer.matrix.device)
        return [Problem(layer.matrix, Metric(eye), layer.zeros)]
    own, cross = layer.moments.own, layer.moments.cross
    parts = layer.matrix.chunk(len(own))
    zeros = [None] * len(own) if layer.zeros is None else layer.zeros.chunk(len(own))
    return [
        Problem.of(part, own[at], None if cross is None else cross[at], zeros[at])
        for at, part in enumerate(parts)
    ]


def best_codes(problem: Problem, levels: Levels) -> tuple[Tensor, Levels]:
    """Codes (outputs, inputs), and the levels with scales as they are stored."""
    rounding = Rounding(problem, levels)
    rounding.feed_forward()
    for _ in range(_ROUNDS):
        rounding.refit()
        rounding.descend(_SWEEPS)
    return rounding.codes, rounding.levels
