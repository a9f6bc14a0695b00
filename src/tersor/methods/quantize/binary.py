"""Binary weights: signs times a scale, or a sum of a few such planes. No data needed.

One plane is the least that a weight can be stored as, and only networks trained for it stay useful;
two planes are the best four levels around zero, better than `quantize.rtn` at 2 bits.

Source: Rastegari et al. 2016 (XNOR-Net), arXiv:1603.05279, eq. 6; Huang et al. 2024 (BiLLM),
arXiv:2402.04291, eq. 5, and Xu et al. 2018, arXiv:1802.00150, algorithm 2, for more planes.
Differs from the papers: scales belong to output channels or groups of their inputs; all weights
get the same number of planes, and inputs are not binarized.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from tersor.errors import OptionError
from tersor.forms import Affine, BitPlanes
from tersor.methods.sparse import check_uncoded, sparse_form
from tersor.recipe import method
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task


@method
def binary(
    model: nn.Module,
    task: Task | None = None,
    *,
    planes: Annotated[int, Field(ge=1, le=4)] = 1,
    group_size: Annotated[int, Field(ge=1)] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight of two or more dimensions as signs and scales, in place.

    planes: bits per weight, 1 to 4, each with a scale of its own
    group_size: inputs that share their scales; None for all of an output channel
    include, exclude: patterns on names and types, see `walk`

    Raises OptionError for a weight that is quantized already, or was pruned: there is no zero.
    """
    sites = walk(model, include, exclude)
    check_uncoded(sites)
    for site in sites:
        if sparse_form(site.form) is not None:
            raise OptionError(
                f'"{site.name}" of shape {tuple(site.weight.shape)} was pruned, and signs hold no '
                "zero; use quantize.ternary, or exclude it"
            )
    for site in sites:
        if planes == 1:
            form = Affine.encode(site.weight, bits=1, group_size=group_size, axis=site.axis)
            site.hold(form)
        else:
            site.hold(
                BitPlanes.encode(site.weight, planes=planes, group_size=group_size, axis=site.axis)
            )
    return model
