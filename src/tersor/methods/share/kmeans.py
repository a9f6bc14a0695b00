"""Weight sharing: a layer's weights become a few values that fit them best. No data needed.

The levels follow the weights, so that it loses far less than `quantize.rtn` with one scale per
tensor. Against rtn's scale per channel it is as good or better at 64 values and more; at 16 and
fewer rtn is usually smaller for the same loss. A pruned layer keeps its zeros.

Source: Han, Mao, Dally 2016 (Deep Compression), arXiv:1510.00149, section 3.1, eq. 2; the starting
points are those of section 3.2.
Differs from the paper: clusters that lose all their weights split the worst one; the values are
stored as float16 where that costs nothing; no fine-tuning of the values.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.forms import Codebook
from tersor.methods.sparse import keep_zeros, sparse_form
from tersor.recipe import method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task

# Rounding could send the search round in circles among equally good choices.
_MOST_ROUNDS = 10_000


@method
def kmeans(
    model: nn.Module,
    task: Task | None = None,
    *,
    values: Annotated[int, Field(ge=2, le=256)] = 16,
    start: Literal["linear", "density"] = "linear",
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Gives every weight of two or more dimensions a codebook of its own, in place.

    values: size of the codebook, 2 to 256; ceil(log2(values)) bits per weight
    start: where the search for the values begins: "linear" spaces them evenly from the smallest to
        the largest weight, which keeps large ones; "density" gives each the same number of weights
    include, exclude: patterns on names and types, see `walk`

    A weight with no more distinct values than `values` is stored exactly.
    """
    for site in walk(model, include, exclude):
        site.hold(encode(site, values=values, start=start))
    return model


def encode(site: Site, *, values: int, start: Literal["linear", "density"] = "linear") -> Codebook:
    """The weight of `site` as codes; sparse codes where the weight was held by a sparse form."""
    weight = site.weight
    sparse = sparse_form(site.form)
    if sparse is None:
        return Codebook.encode(weight, _narrow(clusters(weight, values, start)))
    # The first value is zero, so that code 0 stands for what was pruned.
    others = _narrow(clusters(weight[weight != 0], values - 1, start))
    coded = Codebook.encode(weight, torch.cat((others.new_zeros(1), others)))
    keep_zeros(coded, sparse)
    return coded


def clusters(weight: Tensor, count: int, start: Literal["linear", "density"] = "linear") -> Tensor:
    """At most `count` values, sorted: each the mean of the weights that are nearest to it."""
    ordered = weight.detach().flatten().double().sort().values
    distinct: Tensor = torch.unique_consecutive(ordered)
    if distinct.numel() <= count:
        return distinct.to(weight.dtype)
    steps = torch.arange(count, dtype=ordered.dtype, device=ordered.device)
    if start == "linear":
        first = ordered[0] + steps / max(1, count - 1) * (ordered[-1] - ordered[0])
    else:
        first = ordered[((steps + 0.5) / count * ordered.numel()).long()]
    return _lloyd(ordered, first).to(weight.dtype)


def _lloyd(ordered: Tensor, centers: Tensor) -> Tensor:
    """Lloyd's iteration. In one dimension a cluster is a stretch of the sorted weights."""
    total = nn.functional.pad(ordered.cumsum(0), (1, 0))
    ends = torch.tensor([0, ordered.numel()], device=ordered.device)
    edges: Tensor | None = None
    for _ in range(_MOST_ROUNDS):
        inner = torch.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2, right=True)
        before, edges = edges, torch.cat((ends[:1], inner, ends[1:]))
        if before is not None and torch.equal(before, edges):
            break
        counts = edges.diff()
        centers = torch.where(counts > 0, total[edges].diff() / counts.clamp(min=1), centers)
        if not counts.all():
            centers = _refilled(ordered, edges, centers)
    return centers


def _refilled(ordered: Tensor, edges: Tensor, centers: Tensor) -> Tensor:
    """Moves one cluster without weights to the weight that is farthest from its center."""
    full = edges.diff() > 0
    last = ordered.numel() - 1
    low, high = ordered[edges[:-1].clamp(max=last)], ordered[(edges[1:] - 1).clamp(min=0)]
    far = torch.where(centers - low > high - centers, low, high)
    distance = torch.where(full, (far - centers).abs(), -1)
    moved = centers.clone()
    moved[int((~full).nonzero()[0])] = far[distance.argmax()]
    return moved.sort().values


def _narrow(values: Tensor) -> Tensor:
    """As float16 where that moves no value by more than 2**-11 of the largest."""
    half = values.half()
    lost = (half.to(values.dtype) - values).abs().max() if values.numel() else 0
    return half if lost <= values.abs().max() * 2**-11 else values
