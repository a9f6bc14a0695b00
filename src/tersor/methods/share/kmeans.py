"""Weight sharing: a layer's weights become a few values that fit them best.

Without data it needs no choice but how many; a pruned layer keeps its zeros. With calibration
inputs, errors count by curvature, output channels get scales, and each column of codes makes up for
the errors of those before it: with some `thrift` it is smaller than `quantize.rtn`, and nearer to
the original. Where a runtime wants evenly spaced levels, take `quantize.gptq`; for the smallest
file `quantize.entropy`; for codes of 2 bits and less `share.product`.

Source: Han, Mao, Dally 2016 (Deep Compression), arXiv:1510.00149, section 3.1, eq. 2, and 3.2;
Choi, El-Khamy, Lee 2017, arXiv:1612.01543, eq. 6 to 8, for weights that count by curvature, and
section 4.2 for values priced by their bits; Frantar et al. 2022 (GPTQ), arXiv:2210.17323,
algorithm 1, for error feedback.
Differs from the papers: clusters that lose all their weights split the worst one; values are stored
as float16 where that costs nothing; the second derivative is the energy of the input times that of
the gradient of the output; a bit counts as much as the weight that it is spent on; values are
fitted to their codes by least squares, and trained by `recover.scales`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.forms import Codebook
from tersor.forms.codebook import bits_for
from tersor.forms.form import unrows
from tersor.methods.calibrated import problems
from tersor.methods.layerwise import Layer, layerwise
from tersor.methods.share.clusters import Start, Values, clusters
from tersor.methods.share.coding import Coding, fitted
from tersor.methods.share.gradients import gradients
from tersor.methods.sparse import keep_zeros, sparse_form
from tersor.recipe import method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task

Search = Callable[..., Values]
"""`clusters` with its start, thrift and generator."""

# Rounds of fitting scales and values and going over the codes.
_ROUNDS = 2


@method
def kmeans(
    model: nn.Module,
    task: Task | None = None,
    *,
    values: Annotated[int, Field(ge=2, le=256)] = 16,
    start: Start = "linear",
    thrift: Annotated[float, Field(ge=0, le=16)] = 0.0,
    samples: Annotated[int, Field(ge=0)] = 512,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Gives every weight of two or more dimensions a codebook of its own, in place.

    values: size of the codebook, 2 to 256; ceil(log2(values)) bits per weight
    start: where the search for the values begins: "linear" spaces them evenly from the smallest to
        the largest weight, which keeps large ones; "density" gives each the same number of weights;
        "random" draws weights; "best" is where the squared error is least, by dynamic programming
    thrift: how much error may be taken on to save a bit of the coded file, 0 to 16; 0 takes the
        least error, 1 stops where a bit saves as much error as with many values
    samples: calibration inputs to choose by, at most; with 0, or without a task, the weights alone
        decide
    generator: draws the random start
    include, exclude: patterns on names and types, see `walk`

    Where the weights alone decide, one with no more distinct values than `values` keeps them, to
    2**-11 of the largest. Where inputs do, a weight that is quantized already raises OptionError.
    """
    sites = walk(model, include, exclude)
    search = partial(clusters, start=start, thrift=thrift, generator=generator)
    if task is None or not samples:
        for site in sites:
            site.hold(encode(site, values, search))
        return model
    energies = gradients(model, task, sites, samples=samples)

    def share(layer: Layer) -> Codebook:
        return calibrated(layer, values, search, energies.get(layer.site.name))

    layerwise(model, task, sites, share, samples=samples)
    return model


def encode(site: Site, count: int, search: Search) -> Codebook:
    """The weight of `site` as codes; sparse codes where the weight was held by a sparse form."""
    weight, sparse = site.weight, sparse_form(site.form)
    book = _book(weight, None if sparse is None else weight == 0, count, search)
    stored = _narrow(book.values.to(weight.dtype))
    # In half precision two values that lie close would share their middle with a neighbour.
    wide = torch.promote_types(weight.dtype, torch.float32)
    codes = Values(stored.to(wide), book.prices.to(wide)).codes(weight.to(wide))
    form = Codebook(
        codes.to(torch.uint8), stored, bits=bits_for(stored.numel()), dtype=weight.dtype
    )
    if sparse is not None:
        keep_zeros(form, sparse)
    return form


def calibrated(layer: Layer, count: int, search: Search, energy: Tensor | None) -> Codebook:
    """The same with a scale for each output channel, by what errors do.

    energy: (outputs,) of the gradients of what the layer gives; None for all alike
    """
    matrix, parts = layer.matrix, problems(layer)
    scale = matrix.abs().amax(1, keepdim=True).to(torch.bfloat16)
    scale = scale.clamp(min=torch.finfo(torch.bfloat16).tiny).to(matrix.dtype)
    energy = torch.ones_like(matrix[:, 0]) if energy is None else energy
    inputs = torch.cat([part.metric.energies.expand_as(part.target) for part in parts])
    # Squares of tiny scales are zero in single precision.
    importance = scale.double().square() * energy[:, None] * inputs
    book = _book(matrix / scale, layer.zeros, count, search, importance)
    book = Values(_narrow(book.values).to(matrix.dtype), book.prices.to(matrix.dtype))
    sizes = [len(part.target) for part in parts]
    codings = [
        Coding(*each, book)
        for each in zip(
            parts, scale.split_with_sizes(sizes), energy.split_with_sizes(sizes), strict=True
        )
    ]
    for coding in codings:
        coding.feed_forward()
    for _ in range(_ROUNDS):
        for coding in codings:
            coding.refit()
        values = fitted(codings, book.values, zero=layer.zeros is not None)
        book = Values(_narrow(values).to(matrix.dtype), book.prices)
        for coding in codings:
            coding.rebook(book)
            coding.descend(1)
    return _form(layer, codings, book.values)


def _form(layer: Layer, codings: Sequence[Coding], values: Tensor) -> Codebook:
    """What holds the weight, its values in rising order unless zero comes first."""
    weight, axis = layer.site.weight, layer.site.axis
    codes = torch.cat([coding.codes for coding in codings]).long()
    if layer.sparse is None:
        values, order = values.sort()
        codes = order.argsort()[codes]
    form = Codebook(
        unrows(codes.to(torch.uint8), tuple(weight.shape), axis),
        _narrow(values),
        torch.cat([coding.levels.scale for coding in codings]).to(torch.bfloat16),
        bits=bits_for(values.numel()),
        dtype=weight.dtype,
        axis=axis,
    )
    if layer.sparse is not None:
        keep_zeros(form, layer.sparse)
    return form


def _book(
    numbers: Tensor,
    zeros: Tensor | None,
    count: int,
    search: Search,
    importance: Tensor | None = None,
) -> Values:
    """Values for all numbers; zero, for nothing, and values for the others where there are zeros.

    Zero then comes first, so that code 0 stands for what was pruned.
    """
    if zeros is None:
        return search(numbers, count, importance=importance)
    kept = ~zeros
    if not kept.any():
        return Values.free(numbers.new_zeros(1).double())
    weighed = None if importance is None else importance[kept]
    others = search(numbers[kept], count - 1, importance=weighed)
    return Values(
        torch.cat((others.values.new_zeros(1), others.values)),
        torch.cat((others.prices.new_zeros(1), others.prices)),
    )


def _narrow(values: Tensor) -> Tensor:
    """As float16 where that moves no value by more than 2**-11 of the largest."""
    half = values.half()
    lost = (half.to(values.dtype) - values).abs().max() if values.numel() else 0
    return half if lost <= values.abs().max() * 2**-11 else values
