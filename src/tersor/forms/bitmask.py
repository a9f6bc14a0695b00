"""Bitmask form: one bit per weight says whether it is zero; only the others are stored.

Smaller than dense from 1/32 sparsity on (float32). Sister: `NofM`, when zeros are regular.

Source: Han et al. 2016 (EIE), arXiv:1602.01528, section 3, with a bitmap in place of run lengths.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.forms.form import Form, Part


class Bitmask(Form):
    """weight[mask] = values, zero elsewhere

    mask: (ceil(n / 8),) uint8, bit i % 8 of byte i // 8 is set where weight i is stored
    values: (stored,) of any type, in row-major order
    bits: of one value, where codes need fewer than their type has
    """

    kind = "bitmask"

    def __init__(
        self, mask: Tensor, values: Tensor, shape: tuple[int, ...], bits: int | None = None
    ) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(shape, values.dtype)
        self.bits = bits
        self.register_buffer("mask", mask.contiguous())
        self.values = nn.Parameter(values.contiguous(), requires_grad=False)
        self.mask: Tensor

    @classmethod
    def encode(cls, weight: Tensor, *, bits: int | None = None) -> Self:
        """Stores what is not zero. `weight` may be codes of another form, of `bits` each."""
        flat = weight.detach().reshape(-1)
        kept = flat != 0
        return cls(pack_bits(kept), flat[kept], tuple(weight.shape), bits)

    def kept(self) -> Tensor:
        """Boolean mask of the weight's shape, True where it is stored."""
        n = int(torch.Size(self.shape).numel())
        return unpack_bits(self.mask, n).reshape(self.shape)

    def dense(self) -> Tensor:
        """The weight."""
        values = self.values.to(self.dtype)
        return torch.zeros(self.shape, dtype=self.dtype, device=values.device).masked_scatter(
            self.kept(), values
        )

    def parts(self) -> tuple[Part, ...]:
        """The mask at one bit per weight, and the values."""
        return (("mask", 8), ("values", self.bits or self.values.element_size() * 8))

    def tunable(self) -> tuple[str, ...]:
        """None: what is stored are weights."""
        return ()

    def config(self) -> dict[str, Any]:
        """Bits per value, where the values are codes."""
        return {} if self.bits is None else {"bits": self.bits}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        n = int(torch.Size(shape).numel())
        mask, values = parts["mask"], parts["values"]
        if mask.dtype != torch.uint8 or tuple(mask.shape) != (-(-n // 8),):
            raise ValueError(f"mask must be {-(-n // 8)} bytes for {n} weights")
        if tuple(values.shape) != (int(unpack_bits(mask, n).sum()),):
            raise ValueError("values must be as many as the mask has bits set")
        form = cls(mask, values, shape, checked_bits(config.get("bits"), values))
        form.dtype = dtype
        return form


def checked_bits(bits: int | None, values: Tensor) -> int | None:
    """The bits of codes read from a file. Raises ValueError where they cannot be."""
    if bits is None or (1 <= bits <= 8 and values.dtype in (torch.int8, torch.uint8)):
        return bits
    raise ValueError(f"values of type {values.dtype} cannot be codes of {bits} bits")


def pack_bits(flags: Tensor) -> Tensor:
    """(n,) booleans to (ceil(n / 8),) bytes, first flag in the lowest bit."""
    padded = nn.functional.pad(flags.to(torch.uint8), (0, -flags.numel() % 8)).reshape(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flags.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).reshape(-1)[:n].bool()
