"""Round to nearest: each weight goes to the closest level of its group. No data needed.

The baseline that every other quantizer must beat. Free at 8 bits and nearly free at 5-6 on most
networks; at 4 bits and below smaller groups, or `recover.batchnorm` after it, win much back. A
pruned layer keeps its zeros: its codes are stored as a bitmask.

Source: Jacob et al. 2018, arXiv:1712.05877, eq. 1.
Differs from the paper: the range belongs to an output channel or a group of its inputs, and is
symmetric unless asked otherwise.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from tersor.errors import OptionError
from tersor.forms import Affine
from tersor.methods.sparse import keep_zeros, sparse_form
from tersor.recipe import method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task


@method
def rtn(
    model: nn.Module,
    task: Task | None = None,
    *,
    bits: Annotated[int, Field(ge=1, le=8)] = 8,
    group_size: Annotated[int, Field(ge=1)] | None = None,
    symmetric: bool = True,
    per_tensor: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight of two or more dimensions as `bits`-bit codes, in place.

    bits: bits per weight, 1 to 8
    group_size: inputs that share one scale; None for one scale per output channel
    symmetric: levels -top..top times the scale; otherwise min..max with a zero point
    per_tensor: one scale for the whole weight
    include, exclude: patterns on names and types, see `walk`

    A weight that is stored in exactly this way already stays as it is. Raises OptionError for
    options that do not fit, or a pruned layer that they would fill.
    """
    if per_tensor and group_size is not None:
        raise OptionError(
            f"per_tensor=True and group_size={group_size} contradict each other; drop one"
        )
    for site in walk(model, include, exclude):
        axis = None if per_tensor else site.axis
        layout = {"bits": bits, "group_size": group_size, "axis": axis}
        held = site.form
        if (
            not isinstance(held, Affine)
            or held.config() != layout
            or (held.zero is None) != symmetric
        ):
            site.hold(
                encode(site, bits=bits, group_size=group_size, symmetric=symmetric, axis=axis)
            )
    return model


def encode(
    site: Site, *, bits: int, group_size: int | None, symmetric: bool, axis: int | None
) -> Affine:
    """The weight of `site` as codes; sparse codes where the weight was held by a sparse form."""
    affine = Affine.encode(
        site.weight, bits=bits, group_size=group_size, symmetric=symmetric, axis=axis
    )
    sparse = sparse_form(site.form)
    if sparse is None:
        return affine
    if not symmetric or bits == 1:
        raise OptionError(
            f"symmetric={symmetric}, bits={bits} cannot keep the zeros of the pruned layer "
            f"{site.name!r} of shape {tuple(site.weight.shape)}; use symmetric=True and bits >= 2"
        )
    # Zero is code 0 when symmetric, so the codes are exactly as sparse as the weight was.
    keep_zeros(affine, sparse)
    return affine


def int8(site: Site) -> None:
    """Stores the weight as 8-bit codes, one scale for each output channel, unless it is coded."""
    if site.form is None or sparse_form(site.form) is site.form:
        site.hold(encode(site, bits=8, group_size=None, symmetric=True, axis=site.axis))
