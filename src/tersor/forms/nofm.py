"""N:M form: of every m neighbouring inputs at most n are stored, with their places.

2:4 is what sparse tensor cores execute. Sister: `Bitmask`, for zeros in any place.

Source: Mishra et al. 2021, arXiv:2104.08378, figure 1.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms.bitmask import checked_bits
from tersor.forms.form import Form, Part, rows, unrows


class NofM(Form):
    """weight[o, g * m + places[o, g, j]] = values[o, g, j],   j < n, zero elsewhere

    values: (outputs, groups, n) of any type
    places: (outputs, groups, n) uint8, increasing, each below m
    axis: the output channel of the weight; the rest, flattened, are its inputs (a multiple of m)
    bits: of one value, where codes need fewer than their type has
    """

    kind = "nofm"

    def __init__(
        self,
        values: Tensor,
        places: Tensor,
        *,
        m: int,
        axis: int,
        shape: tuple[int, ...],
        bits: int | None = None,
    ) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(shape, values.dtype)
        self.bits = bits
        self.n, self.m, self.axis = values.shape[2], m, axis
        self.values = nn.Parameter(values.contiguous(), requires_grad=False)
        self.register_buffer("places", places.contiguous())
        self.places: Tensor

    @classmethod
    def encode(
        cls, weight: Tensor, *, n: int, m: int, axis: int = 0, bits: int | None = None
    ) -> Self:
        """Stores the weight, or codes of `bits` each, exactly.

        Raises OptionError where a group has more than n non-zeros.
        """
        shape = tuple(weight.shape)
        if not 1 <= n <= m <= 256:
            raise OptionError(
                f"n={n}, m={m} for a weight of shape {shape}; 1 <= n <= m <= 256 must hold"
            )
        matrix = rows(weight.detach(), axis)
        if matrix.shape[1] % m:
            raise OptionError(
                f"m={m} does not divide the {matrix.shape[1]} inputs of a weight of shape {shape}; "
                "choose a divisor or leave this layer out"
            )
        groups = matrix.reshape(matrix.shape[0], -1, m)
        most = int((groups != 0).sum(-1).max()) if groups.numel() else 0
        if most > n:
            raise OptionError(
                f"a group of {m} inputs of a weight of shape {shape} has {most} non-zeros, more "
                f"than n={n}; prune it to {n}:{m} first"
            )
        # A stable sort of "is zero" brings the non-zeros to the front in their order.
        places = (
            (groups == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :n].sort(-1).values
        )
        kept = groups.gather(-1, places)
        return cls(kept, places.to(torch.uint8), m=m, axis=axis, shape=shape, bits=bits)

    def dense(self) -> Tensor:
        """The weight."""
        outputs, groups, _ = self.values.shape
        out = torch.zeros(outputs, groups, self.m, dtype=self.dtype, device=self.values.device)
        matrix = out.scatter(-1, self.places.long(), self.values.to(self.dtype)).reshape(
            outputs, -1
        )
        return unrows(matrix, self.shape, self.axis)

    def parts(self) -> tuple[Part, ...]:
        """Values, and places at log2(m) bits."""
        return (
            ("values", self.bits or self.values.element_size() * 8),
            ("places", max(1, (self.m - 1).bit_length())),
        )

    def tunable(self) -> tuple[str, ...]:
        """None: what is stored are weights."""
        return ()

    def config(self) -> dict[str, Any]:
        """Group size and layout."""
        bits = {} if self.bits is None else {"bits": self.bits}
        return {"m": self.m, "axis": self.axis, **bits}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        m, axis, values, places = config["m"], config["axis"], parts["values"], parts["places"]
        if not 1 <= m <= 256 or not 0 <= axis < len(shape):
            raise ValueError(f"m={m} or axis={axis} is out of range")
        inputs = int(torch.Size(shape).numel()) // max(1, shape[axis])
        if values.dim() != 3 or tuple(values.shape[:2]) != (shape[axis], inputs // m) or inputs % m:
            raise ValueError(f"values must have shape ({shape[axis]}, {inputs // m}, n)")
        if places.shape != values.shape or places.dtype != torch.uint8 or values.shape[2] > m:
            raise ValueError("places must be uint8 of the shape of values, at most m per group")
        if places.numel() and int(places.max()) >= m:
            raise ValueError(f"a place is not below m={m}")
        bits = checked_bits(config.get("bits"), values)
        form = cls(values, places, m=m, axis=axis, shape=shape, bits=bits)
        form.dtype = dtype
        return form
