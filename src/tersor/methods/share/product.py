"""Product quantization: neighbouring inputs share one code, for 2 bits a weight and fewer.

A layer's sub-vectors of `length` inputs, one kernel of a convolution or 4 neighbours, become at
most `values` of them. With calibration inputs errors count by what the layer's outputs lose, and
each code makes up for the errors of those before it in its row. The table costs `values` * `length`
* 16 bits a layer, so it is for large layers; for small ones, at 3 bits and more, and where the file
is what counts, `share.kmeans`. No runtime multiplies by looking up: it is for bytes, not for speed.
`recover.scales` trains the values.

Source: Stock, Joulin, Gribonval, Graham, Jegou 2020 ("And the bit goes down"), arXiv:1907.05686,
section 3, eq. 2 to 5.
Differs from the paper: errors are fed forward along a row, and the values fitted to all codes at
the end; a layer has at most a value for 8 sub-vectors, where the paper has one for 4; values are
trained by `recover.scales`, layers not one after the other.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import ProductCodebook
from tersor.forms.form import rows
from tersor.forms.product_codebook import MOST_VALUES, code_type
from tersor.methods.calibrated import problems
from tersor.methods.layerwise import Layer, layerwise
from tersor.methods.share.blocks import Blocks, clustered, fitted
from tersor.methods.share.gradients import gradients
from tersor.methods.sparse import check_uncoded
from tersor.recipe import method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task

# Rounds of fitting values and going over the codes.
_ROUNDS = 2
_VECTORS_EACH = 8
_LARGEST_KERNEL, _LENGTH = 9, 4


@method
def product(
    model: nn.Module,
    task: Task | None = None,
    *,
    values: Annotated[int, Field(ge=2, le=MOST_VALUES)] = 256,
    length: Annotated[int, Field(ge=1, le=64)] | None = None,
    samples: Annotated[int, Field(ge=1)] = 512,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight of two or more dimensions as codes of shared sub-vectors, in place.

    values: sub-vectors in the table of a layer, 2 to 4096; log2(values) / length bits per weight
    length: inputs in a sub-vector, 1 to 64; None for a kernel of 2 to 9 weights as a whole, and 4
        inputs elsewhere; where it does not divide them, the last one of a row is cut short
    samples: calibration inputs to use, at most; without a task the weights themselves count
    generator: draws the sub-vectors that the search starts from; a recipe notes its seed
    include, exclude: patterns on names and types, see `walk`

    A layer of few sub-vectors gets fewer values, one for 8 of them. Raises OptionError for a weight
    that is pruned or quantized already.
    """
    sites = walk(model, include, exclude)
    check_uncoded(sites)
    for site in sites:
        if site.form is not None:
            raise OptionError(
                f'"{site.name}" of shape {tuple(site.weight.shape)} is pruned, and shared '
                f'sub-vectors would fill its zeros; use share.kmeans, or exclude="{site.name}"'
            )
    energies = {} if task is None else gradients(model, task, sites, samples=samples)
    seeds = torch.randint(2**31, (len(sites),), generator=generator).tolist()
    seed_of = {site.name: seed for site, seed in zip(sites, seeds, strict=True)}

    def share(layer: Layer) -> ProductCodebook:
        name = layer.site.name
        return encode(layer, values, length, seed_of[name], energies.get(name))

    if task is None:
        for site in sites:
            site.hold(share(Layer(site, rows(site.weight, site.axis).float())))
    else:
        layerwise(model, task, sites, share, samples=samples)
    return model


def encode(
    layer: Layer, count: int, length: int | None, seed: int, energy: Tensor | None
) -> ProductCodebook:
    """The weight of a layer as codes of at most `count` sub-vectors.

    seed: of the draw; energy: (outputs,) of gradients, None for all alike
    """
    matrix, parts = layer.matrix, problems(layer)
    size = min(length or _length_of(layer.site), matrix.shape[1])
    energy = torch.ones_like(matrix[:, 0]) if energy is None else energy
    shares = energy.split_with_sizes([len(part.target) for part in parts])
    blocks = [Blocks(part, size, share) for part, share in zip(parts, shares, strict=True)]
    vectors = torch.cat([each.vectors.flatten(0, 1) for each in blocks])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(vectors), generator=generator)
    found = clustered(blocks, vectors[drawn[: max(1, min(count, len(vectors) // _VECTORS_EACH))]])
    if layer.moments is not None:
        for each in blocks:
            each.feed_forward(found)
        for _ in range(_ROUNDS):
            found = _stored(fitted(blocks, found))
            for each in blocks:
                each.descend(found)
    return _form(layer, torch.cat([each.codes for each in blocks]), found)


def _form(layer: Layer, codes: Tensor, values: Tensor) -> ProductCodebook:
    """What holds the weight, its values by falling use: small codes are frequent then."""
    uses = codes.flatten().bincount(minlength=len(values))
    order = uses.argsort(descending=True, stable=True)
    weight, kept = layer.site.weight, order[uses[order] > 0]
    return ProductCodebook(
        order.argsort()[codes].to(code_type(len(kept))),
        values[kept].half() if _fits(values) else values[kept],
        axis=layer.site.axis,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
    )


def _length_of(site: Site) -> int:
    """A kernel as a whole, or neighbours."""
    kernel = math.prod(site.weight.shape[2:])
    return kernel if 1 < kernel <= _LARGEST_KERNEL else _LENGTH


def _stored(values: Tensor) -> Tensor:
    """As a form stores them."""
    return values.half().to(values.dtype) if _fits(values) else values


def _fits(values: Tensor) -> bool:
    """Whether float16 moves no value by more than 2**-11 of the largest."""
    lost = (values.half().to(values.dtype) - values).abs().max()
    return bool(lost <= values.abs().max() * 2**-11)
