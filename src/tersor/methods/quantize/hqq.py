"""Half-quadratic quantization: the zero point of each group where the weights want it. No data.

Min and max decide where the levels of a group lie in `quantize.rtn`; here all weights of the group
do, and zero points are fractions. That halves the divergence at 3 and 4 bits, at 16 bits a group
for the zero point. With data, `quantize.gptq` goes further.

Source: Badri, Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
mobiusml.github.io/hqq_blog, eq. 1 to 5.
Differs from the paper: errors are measured in steps, so that a weight in other units gets the same
codes, and beta is 2 in those; all rounds are made; the range includes zero; on request scales are
fitted too.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import Affine
from tersor.forms.affine import as_matrix, split_groups
from tersor.methods.sparse import check_uncoded, sparse_form
from tersor.recipe import method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task

_NORM = 0.7
# In steps: half a step, the most that rounding does, shrinks to zero, and what is far more stays.
_BETA, _GROWTH = 2.0, 1.01
_ROUNDS = 20


@method
def hqq(
    model: nn.Module,
    task: Task | None = None,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 4,
    group_size: Annotated[int, Field(ge=1)] | None = 64,
    fit_scale: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight of two or more dimensions as `bits`-bit codes, in place.

    bits: bits per weight, 2 to 8
    group_size: inputs that share a scale and a zero point, 16 bits each; None for all of an output
        channel. The last group may be shorter
    fit_scale: fits scales to the codes as well, by least squares: better for language models, and
        not for convolutions followed by batch norms
    include, exclude: patterns on names and types, see `walk`

    Raises OptionError for a weight that is quantized already, or was pruned: zeros would be lost.
    """
    sites = walk(model, include, exclude)
    check_uncoded(sites)
    for site in sites:
        if sparse_form(site.form) is not None:
            raise OptionError(
                f'"{site.name}" of shape {tuple(site.weight.shape)} was pruned, and levels of hqq '
                "hold no exact zero; use quantize.rtn, or exclude it"
            )
    for site in sites:
        site.hold(_encode(site, bits, group_size, fit_scale))
    return model


def _encode(site: Site, bits: int, group_size: int | None, fit_scale: bool) -> Affine:
    weight = site.weight
    matrix = as_matrix(weight.float(), site.axis)
    grouped = split_groups(matrix, group_size)
    inside = split_groups(torch.ones_like(matrix), group_size)
    scale, zero = _levels(grouped, inside, bits, fit_scale)
    codes = _codes(grouped, scale, zero, bits).to(torch.int8)
    return Affine(
        codes.reshape(len(codes), -1)[:, : matrix.shape[1]],
        scale[..., 0].to(torch.bfloat16),
        zero[..., 0].to(torch.float16),
        bits=bits,
        group_size=group_size,
        axis=site.axis,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        zero_bits=16,
    )


def _levels(grouped: Tensor, inside: Tensor, bits: int, fit_scale: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, (outputs, groups, 1), rounded as they are stored.

    inside: 1 for a weight, 0 for what pads the last group
    """
    count, beta = inside.sum(-1, keepdim=True), _BETA
    low = grouped.amin(-1, keepdim=True).clamp(max=0)
    high = grouped.amax(-1, keepdim=True).clamp(min=0)
    steps = 2**bits - 1
    scale = _narrow(high / steps - low / steps)
    zero = -(2 ** (bits - 1)) - low / scale
    for _ in range(_ROUNDS):
        codes = _codes(grouped, scale, zero, bits)
        # eq. 4: of the error, what is no rounding is set aside; eq. 5: the rest moves the zero.
        apart = grouped / scale - (codes - zero)
        target = grouped - scale * _shrunk(apart, beta)
        middle = (codes * inside).sum(-1, keepdim=True) / count
        mean = (target * inside).sum(-1, keepdim=True) / count
        if fit_scale:
            scale = _slope(codes - middle, target - mean, inside, scale)
        zero = middle - mean / scale
        beta *= _GROWTH
    return scale, zero.clamp(-60_000, 60_000).to(torch.float16).float()


def _shrunk(apart: Tensor, beta: float) -> Tensor:
    """Eq. 4: sign(x) max(0, |x| - |x|**(p - 1) / beta)."""
    size = apart.abs().clamp(min=1e-6)
    return apart.sign() * (size - size ** (_NORM - 1) / beta).clamp(min=0)


def _slope(codes: Tensor, target: Tensor, inside: Tensor, before: Tensor) -> Tensor:
    """The scale with least squared error; the one before where all codes are alike."""
    spread = (codes.square() * inside).sum(-1, keepdim=True)
    common = (codes * target * inside).sum(-1, keepdim=True)
    return torch.where((spread > 0) & (common > 0), _narrow(common / spread), before)


def _narrow(scale: Tensor) -> Tensor:
    """As bfloat16 has it, above zero."""
    return scale.to(torch.bfloat16).float().clamp(min=torch.finfo(torch.bfloat16).tiny)


def _codes(grouped: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (grouped / scale + zero).round().clamp(-half, half - 1)
