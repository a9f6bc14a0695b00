"""Codebook form: every weight is one of a few shared values.

Sister: `Affine`, whose levels are evenly spaced and cost no table.

Source: Han, Mao, Dally 2016 (Deep Compression), arXiv:1510.00149, section 3.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms.form import Form, Part, check_axis


class Codebook(Form):
    """weight = values[codes], times scale[o] of its output channel where there are scales

    codes: the weight's shape, uint8, each below 2**bits
    values: (k,) floats, k <= 2**bits
    scale: (outputs, 1) bfloat16, None for none
    bits: 1 to 8
    axis: dimension of the output channels that scales belong to
    """

    kind = "codebook"

    def __init__(
        self,
        codes: Tensor,
        values: Tensor,
        scale: Tensor | None = None,
        *,
        bits: int,
        dtype: torch.dtype,
        axis: int = 0,
    ) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(tuple(codes.shape), dtype)
        self.bits, self.axis = bits, axis
        self.register_buffer("codes", codes.contiguous())
        self.values = nn.Parameter(values.contiguous(), requires_grad=False)
        kept = None if scale is None else nn.Parameter(scale.contiguous(), requires_grad=False)
        self.register_parameter("scale", kept)
        self.codes: Tensor
        self.scale: nn.Parameter | None

    @classmethod
    def encode(cls, weight: Tensor, values: Tensor) -> Self:
        """Gives each weight the nearest of `values` (k,), 1 <= k <= 256; the lower one on a tie."""
        k = values.numel()
        if values.dim() != 1 or not 1 <= k <= 256:
            raise OptionError(
                f"values of shape {tuple(values.shape)} for a weight of shape "
                f"{tuple(weight.shape)}; a codebook is a vector of 1 to 256 values"
            )
        # In half precision two values that lie close would share their middle with a neighbour.
        wide = torch.promote_types(weight.dtype, torch.float32)
        # Stable, so that of equal values the first is taken: a zero in front keeps zeros at code 0.
        ordered, order = values.detach().to(weight.dtype).to(wide).sort(stable=True)
        middles = (ordered[1:] + ordered[:-1]) / 2
        codes = order[torch.bucketize(weight.detach().to(wide).contiguous(), middles)]
        return cls(
            codes.to(torch.uint8),
            values.detach().clone(),
            bits=bits_for(k),
            dtype=weight.dtype,
        )

    def dense(self) -> Tensor:
        """The weight."""
        if self.scale is None:
            return self.values.to(self.dtype)[self.codes.int()]
        weight = self.values.float()[self.codes.int()] * self.along(self.scale).float()
        return weight.to(self.dtype)

    def along(self, scale: Tensor) -> Tensor:
        """Scales, shaped to go with the weight."""
        return scale.reshape([-1 if dim == self.axis else 1 for dim in range(len(self.shape))])

    def parts(self) -> tuple[Part, ...]:
        """Codes at `bits` each, the table, and scales at 16 bits."""
        scale: tuple[Part, ...] = () if self.scale is None else (("scale", 16),)
        return (("codes", self.bits), ("values", self.values.element_size() * 8), *scale)

    def config(self) -> dict[str, Any]:
        """Bits per code, and whose the scales are where there are scales."""
        return {"bits": self.bits} | ({} if self.scale is None else {"axis": self.axis})

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        codes, values = parts["codes"], parts["values"]
        if (
            not 1 <= config["bits"] <= 8
            or tuple(codes.shape) != shape
            or codes.dtype != torch.uint8
        ):
            raise ValueError(f"codes must be uint8 of shape {shape}, at 1 to 8 bits")
        if values.dim() != 1 or (codes.numel() and int(codes.max()) >= values.numel()):
            raise ValueError(f"a code points past the {values.numel()} values")
        if not values.is_floating_point():
            raise ValueError("values must be floats")
        scale = parts.get("scale")
        if scale is None:
            return cls(codes, values, bits=config["bits"], dtype=dtype)
        axis = config["axis"]
        check_axis(shape, axis)
        if tuple(scale.shape) != (shape[axis], 1) or scale.dtype != torch.bfloat16:
            raise ValueError(f"scale must be bfloat16 of shape {(shape[axis], 1)}")
        return cls(codes, values, scale, bits=config["bits"], dtype=dtype, axis=axis)


def bits_for(values: int) -> int:
    """Bits of a code that tells so many values apart, at least 1."""
    return max(1, (values - 1).bit_length())
