"""Magnitude pruning: the smallest weights become zero, only the others are stored. No data needed.

The baseline of pruning. Without retraining it costs little up to about 20-30 %; the mask takes a
bit per weight back, so that `quantize.rtn` alone usually buys more for the same loss. Zeros in any
place make no network faster by themselves.

Source: Han et al. 2015, arXiv:1506.02626, section 3 (threshold per layer); Zhu and Gupta 2017,
arXiv:1710.01878, section 3 (the threshold that gives an exact sparsity).
Differs from the papers: one shot, without retraining between steps; ties go by place.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import Bitmask, Dense, NofM
from tersor.recipe import method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task


@method
def magnitude(
    model: nn.Module,
    task: Task | None = None,
    *,
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    scope: Literal["layer", "global"] = "layer",
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Sets the smallest weights to zero and stores the rest under a bitmask, in place.

    sparsity: fraction of the weights that become zero, above 0 and below 1
    scope: "layer" removes the same fraction of each; "global" compares all chosen weights with each
        other, so that layers with small weights lose more: better for networks with batch norm
    include, exclude: patterns on names and types, see `walk`

    Removes exactly round(sparsity * n) of n weights; zeros that were there already count. Raises
    OptionError for a layer that would lose all its weights, or that is quantized already.
    """
    sites = walk(model, include, exclude)
    for site in sites:
        forms = list(site.form.forms()) if site.form is not None else []
        if not all(isinstance(form, Bitmask | NofM | Dense) for form in forms):
            raise OptionError(
                f"{site.name!r} of shape {tuple(site.weight.shape)} is stored as {forms[0].kind}; "
                f"pruning would give its codes up. Prune first, or leave it out with "
                f'exclude="{site.name}"'
            )
    sizes = [site.weight.abs().float().flatten() for site in sites]
    groups = [torch.cat(sizes)] if scope == "global" else sizes
    kept = torch.split(
        torch.cat([largest(group, sparsity) for group in groups]), [len(size) for size in sizes]
    )
    for site, keep in zip(sites, kept, strict=True):
        if not keep.any():
            raise _emptied(site, sparsity, scope)
    for site, keep in zip(sites, kept, strict=True):
        weight = site.weight
        site.hold(Bitmask.encode(weight.masked_fill(~keep.view(weight.shape), 0)))
    return model


def largest(sizes: Tensor, sparsity: float) -> Tensor:
    """True for all but the round(sparsity * n) smallest of n sizes; of equal ones the first go."""
    count = round(sparsity * sizes.numel())
    keep = torch.ones_like(sizes, dtype=torch.bool)
    if count:
        threshold = sizes.kthvalue(count).values
        keep = sizes > threshold
        tied = (sizes == threshold).nonzero().flatten()
        keep[tied[count - int((sizes < threshold).sum()) :]] = True
    return keep


def _emptied(site: Site, sparsity: float, scope: str) -> OptionError:
    way_out = "a lower sparsity"
    if scope == "global":
        way_out += ' or scope="layer"'
    return OptionError(
        f"sparsity={sparsity} would remove every weight of {site.name!r} of shape "
        f'{tuple(site.weight.shape)}; use {way_out}, or leave it out with exclude="{site.name}"'
    )
