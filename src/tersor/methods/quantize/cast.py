"""Narrow floats: every weight in 16 or 8 bits of a float type. No data needed.

Half precision costs nothing on almost any network and halves it; float8 quarters it, with scales
that bring each output channel into the type's range. `quantize.rtn` at 8 bits is as small as
float8 and mostly closer: its steps are even, and few weights lie near zero compared with the
largest of their channel. Take float8 where the hardware multiplies it.

Source: IEEE 754-2019 (binary16); Kalamkar et al. 2019 (bfloat16), arXiv:1905.12322, section 3;
Micikevicius et al. 2022 (FP8), arXiv:2209.05433, table 1 and section 3.
Differs from the papers: scales belong to output channels and are bfloat16.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import Bitmask, Dense, NofM
from tersor.recipe import method
from tersor.surgery.hold import form_of, hold
from tersor.surgery.walk import Patterns, Site, vectors, walk
from tersor.task import Task

TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@method
def cast(
    model: nn.Module,
    task: Task | None = None,
    *,
    format: Literal["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"] = "fp16",
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight as floats of 16 or 8 bits, in place.

    format: "fp16", a step of 2**-11 and at most 65,504; "bf16", 2**-8 and the range of float32;
        "fp8_e4m3", 2**-4, and "fp8_e5m2", 2**-3, with a scale for each output channel. The 16-bit
        types also hold biases and the scales and shifts of norms
    include, exclude: patterns on names and types, see `walk`

    What takes no more bits already stays as it is, and a pruned layer keeps its mask. Raises
    OptionError for a weight that is quantized already, or too large for fp16.
    """
    dtype = TYPES[format]
    sites = [site for site in walk(model, include, exclude) if _wider(site, dtype)]
    if dtype.itemsize == 2:
        sites += [site for site in vectors(model, include, exclude) if _wider(site, dtype)]
        _check_range(sites, format, dtype)
    for site in sites:
        form = site.form
        if isinstance(form, Bitmask | NofM):
            values = form.values.detach()
            hold(form, "values", _dense(values, dtype, 0 if isinstance(form, NofM) else None))
        else:
            site.hold(_dense(site.weight, dtype, site.axis))
    return model


def _wider(site: Site, dtype: torch.dtype) -> bool:
    """Whether its floats take more bits than `dtype`. Raises OptionError for codes."""
    form = site.form
    if form is None:
        return site.weight.element_size() > dtype.itemsize
    inner = form_of(form, "values") if isinstance(form, Bitmask | NofM) else form
    if inner is None:
        stored = form.get_parameter("values")
    elif isinstance(inner, Dense):
        stored = inner.stored
    else:
        raise OptionError(
            f'"{site.name}" of shape {tuple(site.weight.shape)} is held as {inner.kind} already, '
            "which floats would only enlarge; start from the original, or exclude it"
        )
    return stored.element_size() > dtype.itemsize


def _check_range(sites: list[Site], format: str, dtype: torch.dtype) -> None:
    for site in sites:
        largest, most = site.weight.abs().max().item(), torch.finfo(dtype).max
        if largest > most:
            raise OptionError(
                f'format="{format}" holds at most {most:g}, but "{site.name}" of shape '
                f'{tuple(site.weight.shape)} reaches {largest:g}; choose "bf16", or exclude it'
            )


def _dense(weight: Tensor, dtype: torch.dtype, axis: int | None) -> Dense:
    if dtype.itemsize == 2:
        return Dense.encode(weight, dtype=dtype)
    return Dense.encode_scaled(weight, dtype=dtype, axis=axis)
