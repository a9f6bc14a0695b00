"""Affine form: integer codes with one scale, and where asked one zero point, per group of inputs.

Sister: `Codebook` for levels that need not be evenly spaced.

Source: Jacob et al. 2018, arXiv:1712.05877, eq. 1; one-bit scales from Rastegari et al. 2016
(XNOR-Net), arXiv:1603.05279, eq. 6.
Differs: the range belongs to a group of inputs of one output channel, scales are bfloat16 (the
codes are chosen after the scale was rounded, so the bound below still holds).
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms.form import Form, Part, check_axis, rows, unrows


class Affine(Form):
    """weight[o, i] = (codes[o, i] - zero[o, g]) * scale[o, g],   g = i // group_size

    The weight is seen as (outputs, inputs) with channel `axis` first; per tensor it is one row.

    codes: (outputs, inputs) int8 in [-2**(bits-1), 2**(bits-1) - 1]; at one bit symmetric, -1 and 0
        stand for -scale and +scale
    scale: (outputs, groups) bfloat16, > 0
    zero: (outputs, groups) int8 or float16, or None when symmetric
    bits: 1 to 8
    group_size: inputs that share a scale, None for all of a row; the last group may be shorter
    axis: the output channel of the weight, None for one scale per tensor
    zero_bits: 16 where zero points are float16, None where they are whole numbers of `bits`
    """

    kind = "affine"

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        *,
        bits: int,
        group_size: int | None,
        axis: int | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        zero_bits: int | None = None,
    ) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(shape, dtype)
        self.bits, self.group_size, self.axis, self.zero_bits = bits, group_size, axis, zero_bits
        self.register_buffer("codes", codes.contiguous())
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)
        self.register_buffer("zero", None if zero is None else zero.contiguous())
        self.codes: Tensor
        self.zero: Tensor | None

    @classmethod
    def encode(
        cls,
        weight: Tensor,
        *,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = True,
        axis: int | None = 0,
    ) -> Self:
        """Rounds each weight to the nearest of its group's 2**bits levels.

        Symmetric levels span -max|w| .. max|w| in 2**bits - 1 steps of one size (two at one bit:
        -mean|w| and mean|w|); asymmetric ones span min..max with 0 included. An exact zero stays
        exact in both, except at one bit symmetric. Error per weight at most scale / 2 at two bits
        and more.
        """
        check_layout(weight, bits=bits, group_size=group_size, axis=axis)
        # Half precision cannot divide by the smallest scales, so the levels are found in float32.
        wide = torch.promote_types(weight.dtype, torch.float32)
        matrix = as_matrix(weight.detach().to(wide), axis)
        grouped = split_groups(matrix, group_size)
        if bits == 1 and symmetric:
            inside = split_groups(torch.ones_like(matrix), group_size)
            scale, zero = _as_scale(grouped.abs().sum(-1) / inside.sum(-1)), None
        else:
            scale, zero = (_symmetric if symmetric else _asymmetric)(grouped, bits)
        codes = _round(matrix, scale, zero, bits, group_size, symmetric)
        return cls(
            codes,
            scale,
            zero,
            bits=bits,
            group_size=group_size,
            axis=axis,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
        )

    def dense(self) -> Tensor:
        """The weight."""
        # A narrow type holds codes less whole numbers exactly, but not less a fraction.
        kind = torch.promote_types(self.dtype, torch.float32) if self.zero_bits else self.dtype
        # In place: a second copy of all weights would take as long again as computing them.
        codes = self.codes.to(kind, copy=True)
        if self.zero is not None:
            codes -= spread(self.zero.to(kind), codes.shape[1], self.group_size)
        elif self.bits == 1:
            codes.mul_(2).add_(1)
        codes *= spread(self.scale.to(kind), codes.shape[1], self.group_size)
        return from_matrix(codes.to(self.dtype), self.shape, self.axis)

    def parts(self) -> tuple[Part, ...]:
        """Codes at `bits` each, scales at 16, zero points at `bits` or 16."""
        each = self.zero_bits or self.bits
        zero: tuple[Part, ...] = () if self.zero is None else (("zero", each),)
        return (("codes", self.bits), ("scale", self.scale.element_size() * 8), *zero)

    def config(self) -> dict[str, Any]:
        """Bits and layout."""
        fraction = {} if self.zero_bits is None else {"zero_bits": self.zero_bits}
        return {"bits": self.bits, "group_size": self.group_size, "axis": self.axis, **fraction}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        bits, group_size, axis = config["bits"], config["group_size"], config["axis"]
        check_layout(torch.empty(shape, device="meta"), bits=bits, group_size=group_size, axis=axis)
        outputs, inputs = matrix_shape(shape, axis)
        groups = -(-inputs // (group_size or max(1, inputs)))
        zero = parts.get("zero")
        if tuple(parts["codes"].shape) != (outputs, inputs) or parts["codes"].dtype != torch.int8:
            raise ValueError(f"codes must be int8 of shape {(outputs, inputs)}")
        for name in ("scale", "zero"):
            if name in parts and tuple(parts[name].shape) != (outputs, groups):
                raise ValueError(f"{name} must have shape {(outputs, groups)}")
        kind = {None: torch.int8, 16: torch.float16}.get(config.get("zero_bits"))
        if zero is None and "zero_bits" in config:
            raise ValueError("zero_bits without zero points")
        if not parts["scale"].is_floating_point() or (zero is not None and zero.dtype != kind):
            name = str(kind).removeprefix("torch.")
            raise ValueError(f"scale must be of a float type, and zero {name}")
        return cls(
            parts["codes"],
            parts["scale"],
            zero,
            bits=bits,
            group_size=group_size,
            axis=axis,
            shape=shape,
            dtype=dtype,
            zero_bits=16 if zero is not None and kind == torch.float16 else None,
        )


def check_layout(weight: Tensor, *, bits: int, group_size: int | None, axis: int | None) -> None:
    """Raises OptionError unless the options fit the weight."""
    shape = tuple(weight.shape)
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise OptionError(
            f"bits={bits!r} for a weight of shape {shape}; choose a whole number from 1 to 8"
        )
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise OptionError(
            f"group_size={group_size!r} for a weight of shape {shape}; choose a number of inputs "
            ">= 1, or None for one scale per output channel"
        )
    check_axis(shape, axis, none="one scale per tensor")


def as_matrix(weight: Tensor, axis: int | None) -> Tensor:
    """(outputs, inputs), or one row for one scale per tensor."""
    return weight.reshape(1, -1) if axis is None else rows(weight, axis)


def matrix_shape(shape: tuple[int, ...], axis: int | None) -> tuple[int, int]:
    """(outputs, inputs) of a weight."""
    outputs, inputs = as_matrix(torch.empty(shape, device="meta"), axis).shape
    return outputs, inputs


def from_matrix(matrix: Tensor, shape: tuple[int, ...], axis: int | None) -> Tensor:
    """The inverse of `as_matrix`."""
    return matrix.reshape(shape) if axis is None else unrows(matrix, shape, axis)


def split_groups(matrix: Tensor, group_size: int | None) -> Tensor:
    """(outputs, groups, group_size), the last group padded with zeros."""
    size = group_size or max(1, matrix.shape[1])
    short = -matrix.shape[1] % size
    if short:
        matrix = nn.functional.pad(matrix, (0, short))
    return matrix.reshape(matrix.shape[0], matrix.shape[1] // size, size)


def spread(per_group: Tensor, inputs: int, group_size: int | None) -> Tensor:
    """Repeats (outputs, groups) along the inputs so that it multiplies (outputs, inputs)."""
    if group_size is None or per_group.shape[1] <= 1:
        return per_group
    return per_group.repeat_interleave(group_size, dim=1)[:, :inputs]


def _symmetric(grouped: Tensor, bits: int) -> tuple[Tensor, None]:
    return _as_scale(grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)), None


def _asymmetric(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    # Divided before subtracting: the whole range of float32 is more than float32 can hold.
    scale = _as_scale(high / (top - bottom) - low / (top - bottom))
    zero = (bottom - low / scale.to(low.dtype)).round().clamp(bottom, top)
    return scale, zero.to(torch.int8)


def _as_scale(scale: Tensor) -> Tensor:
    # Rounded up to bfloat16, so that the largest weight of a group is still within the levels.
    narrow = scale.to(torch.bfloat16)
    up = torch.nextafter(narrow, torch.full_like(narrow, float("inf")))
    narrow = torch.where(narrow.to(scale.dtype) < scale, up, narrow)
    return narrow.clamp(min=torch.finfo(torch.bfloat16).tiny)


def _round(
    matrix: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int | None,
    symmetric: bool,
) -> Tensor:
    if symmetric and bits == 1:
        return (matrix >= 0).to(torch.int8) - 1
    levels = matrix / spread(scale.to(matrix.dtype), matrix.shape[1], group_size)
    if zero is not None:
        levels = levels + spread(zero.to(matrix.dtype), matrix.shape[1], group_size)
    top = 2 ** (bits - 1) - 1
    return levels.round().clamp(-top if symmetric else -top - 1, top).to(torch.int8)
