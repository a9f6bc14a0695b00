"""Fake-affine form: a float weight that is rounded on every read, for training with quantization.

Source: Esser et al. 2020 (LSQ), arXiv:1902.08153, eqs. 1-3 and section 2.2 (gradient scale); Fan et
al. 2021 (Quant-Noise), arXiv:2004.07320, eq. 6, for rounding only some weights.
Differs: the scale is rounded to bfloat16 with a straight-through gradient, so that `freeze` gives
an `Affine` whose weight is equal bit for bit.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms.affine import (
    Affine,
    as_matrix,
    check_layout,
    from_matrix,
    split_groups,
    spread,
)
from tersor.forms.form import Form, Part


class FakeAffine(Form):
    """weight = clamp(round(latent / scale), -top, top) * scale,   top = 2**(bits-1) - 1

    latent: (outputs, inputs) the float weight being trained
    scale: (outputs, groups) float, trained too; a step may take it below 0, where its size counts
    chosen: (outputs, inputs) which weights are rounded where gradients are recorded; None for all
    bits: 2 to 8, symmetric
    """

    kind = "fake_affine"
    training_only = True

    def __init__(
        self,
        latent: Tensor,
        scale: Tensor,
        *,
        bits: int,
        group_size: int | None,
        axis: int | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(shape, dtype)
        self.bits, self.group_size, self.axis = bits, group_size, axis
        self.latent = nn.Parameter(latent.contiguous())
        self.scale = nn.Parameter(scale.contiguous())
        self.chosen: Tensor | None = None

    @classmethod
    def encode(
        cls, weight: Tensor, *, bits: int, group_size: int | None = None, axis: int | None = 0
    ) -> Self:
        """Starts from the weight with LSQ's first scale, 2 mean|w| / sqrt(top)."""
        check_layout(weight, bits=bits, group_size=group_size, axis=axis)
        if bits < 2:
            raise OptionError(
                f"bits={bits} for a weight of shape {tuple(weight.shape)}; training needs 2 to 8"
            )
        matrix = as_matrix(weight.detach(), axis).clone()
        grouped = split_groups(matrix, group_size)
        scale = 2 * grouped.abs().mean(-1) / (2 ** (bits - 1) - 1) ** 0.5
        scale = scale.clamp(min=torch.finfo(torch.bfloat16).tiny)
        return cls(
            matrix,
            scale,
            bits=bits,
            group_size=group_size,
            axis=axis,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
        )

    def dense(self) -> Tensor:
        """The rounded weight; gradients reach latent (inside the range) and scale."""
        top = 2 ** (self.bits - 1) - 1
        inputs = self.latent.shape[1]
        damping = 1.0 / (self.latent.numel() / max(1, self.scale.numel()) * top) ** 0.5
        size = self._size()
        damped = size * damping + (size * (1 - damping)).detach()
        # Rounded from the scale itself: damping may move it by a bit, across a bfloat16's edge.
        rounded = damped + (size.to(torch.bfloat16).to(damped.dtype) - damped).detach()
        scale = spread(rounded, inputs, self.group_size)
        levels = (self.latent / scale).clamp(-top, top)
        matrix = (levels + (levels.round() - levels).detach()) * scale
        if self.chosen is not None and torch.is_grad_enabled():
            matrix = torch.where(self.chosen, matrix, self.latent)
        return from_matrix(matrix.to(self.dtype), self.shape, self.axis)

    def freeze(self) -> Affine:
        """The deployed form; its weight equals `dense()` exactly."""
        top = 2 ** (self.bits - 1) - 1
        scale = self._size().detach().to(torch.bfloat16)
        levels = self.latent.detach() / spread(
            scale.to(self.latent.dtype), self.latent.shape[1], self.group_size
        )
        codes = levels.clamp(-top, top).round().to(torch.int8)
        return Affine(
            codes,
            scale,
            None,
            bits=self.bits,
            group_size=self.group_size,
            axis=self.axis,
            shape=self.shape,
            dtype=self.dtype,
        )

    def _size(self) -> Tensor:
        """The scale, above 0."""
        return self.scale.abs().clamp(min=torch.finfo(torch.bfloat16).tiny)

    def parts(self) -> tuple[Part, ...]:
        """What `freeze` will store."""
        return (("latent", self.bits), ("scale", 16))

    def config(self) -> dict[str, Any]:
        """Bits and layout."""
        return {"bits": self.bits, "group_size": self.group_size, "axis": self.axis}
