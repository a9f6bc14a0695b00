"""Bit-plane form: a weight as a sum of a few scaled matrices of signs.

Two planes are four levels around zero that need not be even, as two bits of `Affine` would be.

Source: Xu et al. 2018, "Alternating Multi-bit Quantization for Recurrent Neural Networks",
arXiv:1802.00150, eq. 2 and algorithm 2; the start from Huang et al. 2024 (BiLLM),
arXiv:2402.04291, eq. 5.
Differs from the papers: scales belong to groups of inputs, are bfloat16 and in falling order; all
weights have the same number of planes.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms.affine import (
    as_matrix,
    check_layout,
    from_matrix,
    matrix_shape,
    split_groups,
    spread,
)
from tersor.forms.form import Form, Part, check_axis

MOST_PLANES = 4
_ROUNDS = 20


class BitPlanes(Form):
    """weight[o, i] = sum over p of sign(p, codes[o, i]) * scale[o, g, p],   g = i // group_size

    sign(p, code) is 1 where bit planes - 1 - p of code + 2**(planes - 1) is set, else -1

    codes: (outputs, inputs) int8 in [-2**(planes-1), 2**(planes-1) - 1]
    scale: (outputs, groups, planes) bfloat16
    planes: 1 to MOST_PLANES
    group_size: inputs that share scales, None for all of a row; the last group may be shorter
    axis: the output channel of the weight
    """

    kind = "bit_planes"

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        *,
        planes: int,
        group_size: int | None,
        axis: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(shape, dtype)
        self.planes, self.group_size, self.axis = planes, group_size, axis
        self.register_buffer("codes", codes.contiguous())
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)
        self.codes: Tensor

    @classmethod
    def encode(
        cls, weight: Tensor, *, planes: int = 2, group_size: int | None = None, axis: int = 0
    ) -> Self:
        """Fits scales and signs in turn, each the best for the other in squared error."""
        _check(tuple(weight.shape), planes, group_size, axis)
        matrix = as_matrix(weight.detach().float(), axis)
        grouped = split_groups(matrix, group_size)
        inside = split_groups(torch.ones_like(matrix), group_size)
        scale = _ordered(_residual(grouped, inside, planes))
        for _ in range(_ROUNDS):
            codes = _nearest(grouped, scale)
            found = _ordered(_least_squares(grouped, inside, codes, planes))
            if torch.equal(found, scale):
                break
            scale = found
        codes = _nearest(grouped, scale).flatten(1)[:, : matrix.shape[1]]
        return cls(
            codes,
            scale.to(torch.bfloat16),
            planes=planes,
            group_size=group_size,
            axis=axis,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
        )

    def dense(self) -> Tensor:
        """The weight."""
        table = signs(self.planes, self.codes.device)
        total = torch.zeros((), device=self.codes.device)
        for plane in range(self.planes):
            scale = spread(self.scale[..., plane].float(), self.codes.shape[1], self.group_size)
            total = total + table[plane][self.codes.int()] * scale
        return from_matrix(total.to(self.dtype), self.shape, self.axis)

    def parts(self) -> tuple[Part, ...]:
        """A bit for each plane, scales at 16."""
        return (("codes", self.planes), ("scale", 16))

    def config(self) -> dict[str, Any]:
        """Number of planes, and layout."""
        return {"planes": self.planes, "group_size": self.group_size, "axis": self.axis}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        planes, size, axis = config["planes"], config["group_size"], config["axis"]
        _check(shape, planes, size, axis)
        outputs, inputs = matrix_shape(shape, axis)
        codes, scale = parts["codes"], parts["scale"]
        half = 2 ** (planes - 1)
        if tuple(codes.shape) != (outputs, inputs) or codes.dtype != torch.int8:
            raise ValueError(f"codes must be int8 of shape {(outputs, inputs)}")
        if bool(((codes < -half) | (codes >= half)).any()):
            raise ValueError(f"codes must be from {-half} to {half - 1}")
        wanted = (outputs, -(-inputs // (size or max(1, inputs))), planes)
        if tuple(scale.shape) != wanted or scale.dtype != torch.bfloat16:
            raise ValueError(f"scale must be bfloat16 of shape {wanted}")
        return cls(
            codes, scale, planes=planes, group_size=size, axis=axis, shape=shape, dtype=dtype
        )


def signs(planes: int, device: torch.device | None = None) -> Tensor:
    """(planes, 2**planes) of 1 and -1 by code; a negative code counts from the end."""
    places = torch.arange(planes - 1, -1, -1, device=device)[:, None]
    raised = torch.arange(2**planes, device=device) >> places & 1
    return (2.0 * raised - 1).roll(-(2 ** (planes - 1)), 1)


def _check(shape: tuple[int, ...], planes: int, group_size: int | None, axis: int) -> None:
    if type(planes) is not int or not 1 <= planes <= MOST_PLANES:
        raise OptionError(
            f"planes={planes!r} for a weight of shape {shape}; choose 1 to {MOST_PLANES}"
        )
    check_axis(shape, axis)
    check_layout(torch.empty(shape, device="meta"), bits=planes, group_size=group_size, axis=axis)


def _residual(grouped: Tensor, inside: Tensor, planes: int) -> Tensor:
    """(outputs, groups, planes): each plane the mean size of what those before have left."""
    left, found = grouped, []
    for _ in range(planes):
        found.append((left.abs() * inside).sum(-1) / inside.sum(-1))
        left = left - torch.where(left < 0, -1, 1) * found[-1][..., None]
    return torch.stack(found, -1)


def _least_squares(grouped: Tensor, inside: Tensor, codes: Tensor, planes: int) -> Tensor:
    """The scales with the least squared error for the signs."""
    plane = signs(planes, grouped.device)[:, codes.int()].movedim(0, -1) * inside[..., None]
    plane = plane.double()
    gram = plane.mT @ plane
    # Planes that agree everywhere leave their scales open; this shares them out.
    gram = gram + 1e-9 * inside.sum(-1)[..., None, None] * torch.eye(planes, device=gram.device)
    wanted = plane.mT @ grouped.double()[..., None]
    found: Tensor = torch.linalg.solve(gram, wanted)
    return found[..., 0].float()


def _ordered(scale: Tensor) -> Tensor:
    """The same levels, with scales that are positive, in falling order, and rounded as stored."""
    scale = scale.abs().sort(-1, descending=True).values
    return scale.to(torch.bfloat16).float()


def _nearest(grouped: Tensor, scale: Tensor) -> Tensor:
    """Codes of the nearest levels, int8; of two that are as near the lower code."""
    planes = scale.shape[-1]
    half = 2 ** (planes - 1)
    table = signs(planes, grouped.device)
    best = torch.full_like(grouped, torch.inf)
    codes = torch.zeros_like(grouped, dtype=torch.int8)
    for code in range(-half, half):
        level = (scale * table[:, code]).sum(-1, keepdim=True)
        apart = (grouped - level).abs()
        codes = torch.where(apart < best, code, codes)
        best = torch.minimum(apart, best)
    return codes.to(torch.int8)
