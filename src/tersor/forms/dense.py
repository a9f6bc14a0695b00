"""Dense form: the weight itself, in its own or a narrower float type.

Source: of the 8-bit types and of scales that use their range, Micikevicius et al. 2022,
arXiv:2209.05433, section 3.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms.affine import as_matrix, from_matrix
from tersor.forms.form import Form, Part, check_axis

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


class Dense(Form):
    """weight = stored.to(dtype), times scale[o] of its output channel where there are scales

    stored: the weight's shape, one of FLOATS
    scale: (outputs, 1) bfloat16, or (1, 1) for one; None for none
    axis: the output channel that a scale belongs to, None for one scale or none
    """

    kind = "dense"

    def __init__(
        self,
        stored: Tensor,
        dtype: torch.dtype,
        scale: Tensor | None = None,
        axis: int | None = None,
    ) -> None:
        """Keeps `stored`; `dense` returns it as `dtype`."""
        super().__init__(tuple(stored.shape), dtype)
        self.axis = axis
        self.stored = nn.Parameter(stored.detach().contiguous(), requires_grad=False)
        kept = None if scale is None else nn.Parameter(scale.contiguous(), requires_grad=False)
        self.register_parameter("scale", kept)
        self.scale: nn.Parameter | None

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

    @classmethod
    def encode_scaled(cls, weight: Tensor, *, dtype: torch.dtype, axis: int | None = 0) -> Self:
        """Brings the largest weight of each output channel to the largest number of `dtype`.

        The relative error is that of `encode`, but for weights so much smaller than the largest
        that they leave the normal range: by more than 2**-14 (e4m3) or 2**-29 (e5m2).
        """
        matrix = as_matrix(weight.detach().float(), axis)
        most = torch.finfo(dtype).max
        scale = (matrix.abs().amax(1, keepdim=True) / most).to(torch.bfloat16)
        scale = scale.clamp(min=torch.finfo(torch.bfloat16).tiny)
        stored = (matrix / scale.float()).clamp(-most, most).to(dtype)
        return cls(from_matrix(stored, tuple(weight.shape), axis), weight.dtype, scale, axis)

    def dense(self) -> Tensor:
        """The weight."""
        if self.scale is None:
            return self.stored.to(self.dtype)
        matrix = as_matrix(self.stored.float(), self.axis) * self.scale.float()
        return from_matrix(matrix, self.shape, self.axis).to(self.dtype)

    def parts(self) -> tuple[Part, ...]:
        """The weight, and scales at 16 bits."""
        scale: tuple[Part, ...] = () if self.scale is None else (("scale", 16),)
        return (("stored", self.stored.element_size() * 8), *scale)

    def tunable(self) -> tuple[str, ...]:
        """The scales; the rest are weights."""
        return () if self.scale is None else ("scale",)

    def config(self) -> dict[str, Any]:
        """Whose the scales are, where there are scales."""
        return {} if self.scale is None else {"axis": self.axis}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        stored, scale = parts["stored"], parts.get("scale")
        if tuple(stored.shape) != shape or stored.dtype not in FLOATS:
            raise ValueError(f"stored must be a float tensor of shape {shape}")
        axis = config.get("axis")
        if scale is None:
            return cls(stored, dtype)
        check_axis(shape, axis, none="one scale")
        wanted = (1 if axis is None else shape[axis], 1)
        if tuple(scale.shape) != wanted or scale.dtype != torch.bfloat16:
            raise ValueError(f"scale must be bfloat16 of shape {wanted}")
        return cls(stored, dtype, scale, axis)
