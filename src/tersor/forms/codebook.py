"""Codebook form: every weight is one of a few shared values.

Sister: `Affine`, whose levels are evenly spaced and cost no table.

Source: Han, Mao, Dally 2016 (Deep Compression), arXiv:1510.00149, section 3.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms.form import Form, Part


class Codebook(Form):
    """weight = values[codes]

    codes: the weight's shape, uint8, each below 2**bits
    values: (k,) floats, k <= 2**bits
    bits: 1 to 8
    """

    kind = "codebook"

    def __init__(self, codes: Tensor, values: Tensor, *, bits: int, dtype: torch.dtype) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(tuple(codes.shape), dtype)
        self.bits = bits
        self.register_buffer("codes", codes.contiguous())
        self.values = nn.Parameter(values.contiguous(), requires_grad=False)
        self.codes: Tensor

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
            bits=max(1, (k - 1).bit_length()),
            dtype=weight.dtype,
        )

    def dense(self) -> Tensor:
        """The weight."""
        return self.values.to(self.dtype)[self.codes.int()]

    def parts(self) -> tuple[Part, ...]:
        """Codes at `bits` each and the table."""
        return (("codes", self.bits), ("values", self.values.element_size() * 8))

    def config(self) -> dict[str, Any]:
        """Bits per code."""
        return {"bits": self.bits}

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
        return cls(codes, values, bits=config["bits"], dtype=dtype)
