"""Dense form: the weight itself, in its own or a narrower float type."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms.form import Form, Part

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


class Dense(Form):
    """weight = stored.to(dtype)

    stored: the weight's shape, one of FLOATS
    """

    kind = "dense"

    def __init__(self, stored: Tensor, dtype: torch.dtype) -> None:
        """Keeps `stored`; `dense` returns it as `dtype`."""
        super().__init__(tuple(stored.shape), dtype)
        self.stored = nn.Parameter(stored.detach().contiguous(), requires_grad=False)

    @classmethod
    def encode(cls, weight: Tensor, *, dtype: torch.dtype) -> Self:
        """Rounds `weight` to `dtype`, one of FLOATS.

        Relative error per weight at most 2**-11 (float16), 2**-8 (bfloat16), 2**-4 (e4m3), 2**-3
        (e5m2) within the type's normal range. Raises OptionError where a weight would overflow.
        """
        if dtype not in FLOATS:
            raise OptionError(
                f"dtype={dtype} is no float type; choose one of {[str(d) for d in FLOATS]}"
            )
        largest = weight.detach().abs().max().item() if weight.numel() else 0.0
        if largest > torch.finfo(dtype).max:
            raise OptionError(
                f"dtype={dtype} holds at most {torch.finfo(dtype).max:g}, but a weight of shape "
                f"{tuple(weight.shape)} reaches {largest:g}; use torch.bfloat16"
            )
        return cls(weight.detach().to(dtype), weight.dtype)

    def dense(self) -> Tensor:
        """The weight."""
        return self.stored.to(self.dtype)

    def parts(self) -> tuple[Part, ...]:
        """One tensor."""
        return (("stored", self.stored.element_size() * 8),)

    def config(self) -> dict[str, Any]:
        """Nothing beyond the tensor."""
        return {}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        if config or tuple(parts["stored"].shape) != shape or parts["stored"].dtype not in FLOATS:
            raise ValueError(f"stored must be a float tensor of shape {shape}")
        return cls(parts["stored"], dtype)
