"""Round to nearest: each weight goes to the closest level of its group. No data needed.

The baseline that every other quantizer must beat. Free at 8 bits and nearly free at 5-6 on most
networks; at 3 bits and below methods that spend calibration data are worth their time. A pruned
layer keeps its zeros: its codes are stored as a bitmask.

Source: Jacob et al. 2018, arXiv:1712.05877, eq. 1.
Differs from the paper: the range belongs to an output channel or a group of its inputs, and is
symmetric unless asked otherwise.
"""

from __future__ import annotations

from torch import nn

from tersor.errors import OptionError
from tersor.forms import Affine, Bitmask, NofM
from tersor.forms.form import Form
from tersor.recipe import method
from tersor.surgery.hold import hold
from tersor.surgery.walk import Patterns, Site, walk


@method
def rtn(
    model: nn.Module,
    task: object = None,
    *,
    bits: int = 8,
    group_size: int | None = None,
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

    Raises OptionError for options that do not fit, or a pruned layer that they would fill.
    """
    if per_tensor and group_size is not None:
        raise OptionError(
            f"per_tensor=True and group_size={group_size} contradict each other; drop one"
        )
    for site in walk(model, include, exclude):
        axis = None if per_tensor else site.axis
        site.hold(encode(site, bits=bits, group_size=group_size, symmetric=symmetric, axis=axis))
    return model


def encode(
    site: Site, *, bits: int, group_size: int | None, symmetric: bool, axis: int | None
) -> Affine:
    """The weight of `site` as codes; sparse codes where the weight was held by a sparse form."""
    affine = Affine.encode(
        site.weight, bits=bits, group_size=group_size, symmetric=symmetric, axis=axis
    )
    sparse = _sparse(site.form)
    if sparse is None:
        return affine
    if not symmetric or bits == 1:
        raise OptionError(
            f"symmetric={symmetric}, bits={bits} cannot keep the zeros of the pruned layer {site.name!r} of shape "
            f"{tuple(site.weight.shape)}; use symmetric=True and bits >= 2"
        )
    # Zero is code 0 when symmetric, so the codes are exactly as sparse as the weight was.
    codes = affine.codes
    inner: Form = (
        Bitmask.encode(codes)
        if isinstance(sparse, Bitmask)
        else NofM.encode(codes, n=sparse.n, m=sparse.m)
    )
    hold(affine, "codes", inner)
    return affine


def _sparse(form: Form | None) -> Bitmask | NofM | None:
    if form is None:
        return None
    return next((f for f in form.forms() if isinstance(f, Bitmask | NofM)), None)
