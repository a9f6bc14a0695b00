"""Ternary weights: minus one, zero or one, times a scale. No data needed.

At most 1.58 bits a weight in a .tersor file, less where zeros abound. Only networks that were
trained for it, or tuned after it, stay useful; with four levels `quantize.binary` with two planes
loses less.

Source: Li et al. 2016 (Ternary Weight Networks), arXiv:1605.04711, eq. 3 to 6; Ma et al. 2024
(BitNet b1.58), arXiv:2402.17764, eq. 1 to 3, for "absmean".
Differs from the papers: by default the scale is the exact minimum that TWN approximates by a
threshold of 0.7 mean|w|, found by sorting; scales belong to output channels or groups of inputs.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import Affine
from tersor.forms.affine import as_matrix, split_groups
from tersor.methods.sparse import check_uncoded, keep_zeros, sparse_form
from tersor.recipe import method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task

Rule = Literal["exact", "absmean"]


@method
def ternary(
    model: nn.Module,
    task: Task | None = None,
    *,
    rule: Rule = "exact",
    group_size: Annotated[int, Field(ge=1)] | None = None,
    per_tensor: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight of two or more dimensions as -1, 0 or 1 times a scale, in place.

    rule: "exact" takes the scale with the least squared error; "absmean" the mean size, as BitNet
        does in training (together with per_tensor)
    group_size: inputs that share a scale; None for one scale per output channel
    per_tensor: one scale for the whole weight
    include, exclude: patterns on names and types, see `walk`

    A pruned layer keeps its zeros. Raises OptionError for a weight that is quantized already.
    """
    if per_tensor and group_size is not None:
        raise OptionError(
            f"per_tensor=True and group_size={group_size} contradict each other; drop one"
        )
    sites = walk(model, include, exclude)
    check_uncoded(sites)
    for site in sites:
        sparse = sparse_form(site.form)
        form = _encode(site, rule, group_size, None if per_tensor else site.axis)
        if sparse is not None:
            keep_zeros(form, sparse)
        site.hold(form)
    return model


def _encode(site: Site, rule: Rule, group_size: int | None, axis: int | None) -> Affine:
    weight = site.weight
    matrix = as_matrix(weight.float(), axis)
    sizes = split_groups(matrix.abs(), group_size)
    if rule == "exact":
        wanted = best_scale(sizes)
    else:
        wanted = sizes.sum(-1) / split_groups(torch.ones_like(matrix), group_size).sum(-1)
    scale = wanted.to(torch.bfloat16).clamp(min=torch.finfo(torch.bfloat16).tiny)
    # The nearest of three levels: from half a scale on it is the outer one.
    outer = sizes > scale.float()[..., None] / 2
    kept = outer.reshape(len(matrix), -1)[:, : matrix.shape[1]]
    return Affine(
        (matrix.sign() * kept).to(torch.int8),
        scale,
        None,
        bits=2,
        group_size=group_size,
        axis=axis,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
    )


def best_scale(sizes: Tensor) -> Tensor:
    """Of (..., n) sizes the scale a with the least sum of (size - a {0, 1})^2, over both.

    The k largest become a, their mean. What that takes off the error is (sum of them)^2 / k, so the
    best k is one of n. Zeros that pad a group change nothing.
    """
    total = sizes.sort(-1, descending=True).values.cumsum(-1)
    count = torch.arange(1, sizes.shape[-1] + 1, device=sizes.device, dtype=sizes.dtype)
    best = (total.square() / count).argmax(-1, keepdim=True)
    return (total.gather(-1, best) / count[best])[..., 0]
