"""Residual form: another form holds the weight roughly, and two thin matrices add what it misses.

Source: Zhang et al. 2024 (LQER), arXiv:2402.02446, eq. 5.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.forms.affine import matrix_shape
from tersor.forms.form import Form, Part, check_axis, unrows


class Residual(Form):
    """weight = base + left @ right, with the product in the weight's layout

    base: the weight's shape; another form holds it
    left: (outputs, rank) floats, 1 <= rank <= min(outputs, inputs)
    right: (rank, inputs) floats
    axis: the output channel of the weight; the rest, flattened, are its inputs
    """

    kind = "residual"

    def __init__(
        self,
        base: Tensor,
        left: Tensor,
        right: Tensor,
        *,
        axis: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """base: for example `form.dense()`, before `form` holds it"""
        super().__init__(shape, dtype)
        self.axis = axis
        self.register_buffer("base", base.contiguous())
        self.left = nn.Parameter(left.contiguous(), requires_grad=False)
        self.right = nn.Parameter(right.contiguous(), requires_grad=False)
        self.base: Tensor

    def dense(self) -> Tensor:
        """The weight."""
        added = unrows(self.left.float() @ self.right.float(), self.shape, self.axis)
        return (self.base.float() + added).to(self.dtype)

    def parts(self) -> tuple[Part, ...]:
        """What is held by another form, and the factors."""
        return tuple(
            (name, tensor.element_size() * 8)
            for name, tensor in (("base", self.base), ("left", self.left), ("right", self.right))
        )

    def tunable(self) -> tuple[str, ...]:
        """The factors, unless other forms hold them."""
        return tuple(name for name in ("left", "right") if f"{name}_form" not in self._modules)

    def config(self) -> dict[str, Any]:
        """Layout."""
        return {"axis": self.axis}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        axis, base, left, right = config["axis"], parts["base"], parts["left"], parts["right"]
        check_axis(shape, axis)
        if 0 in shape:
            raise ValueError("an empty weight has no residual")
        if tuple(base.shape) != shape or not base.is_floating_point():
            raise ValueError(f"base must be floats of shape {shape}")
        outputs, inputs = matrix_shape(shape, axis)
        rank = left.shape[1] if left.dim() == 2 else 0
        if not 1 <= rank <= min(outputs, inputs):
            raise ValueError(f"left must be a matrix of 1 to {min(outputs, inputs)} columns")
        if tuple(left.shape) != (outputs, rank) or tuple(right.shape) != (rank, inputs):
            raise ValueError(f"left must be {(outputs, rank)} and right {(rank, inputs)}")
        if not left.is_floating_point() or not right.is_floating_point():
            raise ValueError("left and right must be floats")
        return cls(base, left, right, axis=axis, shape=shape, dtype=dtype)
