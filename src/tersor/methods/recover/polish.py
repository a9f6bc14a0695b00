"""Polishing: what a mask leaves of each weight is set to the best there is, by least squares.

For any pruned network before it is quantized, whatever chose the mask; zeros stay zero and no byte
is added. Layers are solved in order, each for what the polished layers before it give and towards
what the original gives, so that later layers undo errors of earlier ones. Needs a few hundred
unlabelled inputs and no training. Gives most after `prune.magnitude` and `prune.wanda`, which move
no weight, less after `prune.sparsegpt`. With batch norms, `recover.batchnorm` comes behind it.

Source: Mozaffari et al. 2025 (OPTIMA), arXiv:2512.13886, for solving row by row on the mask of any
method; Zhang et al. 2026 (Qronos), arXiv:2505.11695, eq. 3, for the outputs of the original as the
target.
Differs from the papers: exact solutions in place of a quadratic program's steps, damped towards the
original weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import Form, NofM
from tersor.forms.form import rows, unrows
from tersor.measure import divergence_of, reference_outputs
from tersor.methods.asked import held_out_of, original_of, prepared
from tersor.methods.calibrated import problems
from tersor.methods.layerwise import Layer, layerwise
from tersor.methods.masks import Pattern, sparse
from tersor.methods.sparse import sparse_form
from tersor.methods.support import least_squares
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task


@method
def polish(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Solves for the values of every pruned weight that is not quantized, in place.

    original: the network before compression; `run` passes the one it was given
    samples: unlabelled calibration inputs to use, at most
    include, exclude: patterns on names and types, see `walk`

    The values stay only if they bring the outputs for held-out inputs closer to the original's; the
    step's outcome says whether, with the divergence before and after. Raises OptionError for a
    network without such weights, TaskError without data.
    """
    task, held_out = held_out_of("recover.polish", task, samples)
    original = original_of("recover.polish", original)
    sites = _pruned(model, include, exclude)
    twin = prepared(original, model, task)
    targets = _targets(sites, twin)
    answers = reference_outputs(original, task, held_out)
    before, after = divergence_of(model, task, held_out, answers), torch.inf
    saved = {site.name: site.form for site in sites}

    def solve(layer: Layer) -> Form:
        return _solved(layer, targets[layer.site.name])

    try:
        layerwise(model, task, sites, solve, samples=samples, original=twin)
        after = divergence_of(model, task, held_out, answers)
    finally:
        for site in sites:
            form = saved[site.name]
            if form is not None and not after < before:
                site.hold(form)
    outcome = {"kept": after < before, "divergence_before": before, "divergence_after": after}
    return model, {**outcome, "layers": len(sites)}


def _pruned(model: nn.Module, include: Patterns, exclude: Patterns) -> list[Site]:
    """Weights that are pruned and not quantized. Raises OptionError where there are none."""
    sites = [s for s in walk(model, include, exclude) if s.form and sparse_form(s.form) is s.form]
    if not sites:
        raise OptionError(
            f"{type(model).__name__} holds no pruned weight that is not quantized, so "
            "recover.polish has nothing to solve for; put it right behind a pruning step"
        )
    return sites


def _targets(sites: Sequence[Site], original: nn.Module) -> dict[str, Tensor]:
    """The same weights of the original, (outputs, inputs). Raises OptionError without one."""
    named = {site.name: site for site in walk(original)}
    for site in sites:
        other = named.get(site.name)
        if other is not None and other.weight.shape == site.weight.shape:
            continue
        found = "no such weight" if other is None else f"shape {tuple(other.weight.shape)}"
        raise OptionError(
            f"original: {site.name!r} has shape {tuple(site.weight.shape)} in the compressed "
            f"network and {found} in the original; pass the network that was pruned, or leave it "
            f'out with exclude="{site.name}"'
        )
    others = [named[site.name] for site in sites]
    return {other.name: rows(other.weight, other.axis).float() for other in others}


def _solved(layer: Layer, original: Tensor) -> Form:
    """The best values of a pruned weight. original: before, (outputs, inputs)"""
    weight, axis = layer.site.weight, layer.site.axis
    parts = problems(replace(layer, matrix=original))
    matrix = torch.cat([least_squares(part) for part in parts]).to(weight.dtype)
    pattern = Pattern(layer.sparse.n, layer.sparse.m) if isinstance(layer.sparse, NofM) else None
    return sparse(unrows(matrix, tuple(weight.shape), axis), axis, pattern)
