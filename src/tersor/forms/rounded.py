"""Rounded form: a float weight that is rounded to a uniform, unbounded grid on every read.

For training weights against the bits that their codes will need; frozen it is a `Trellis` of one
state.

Source: Bengio, Leonard, Courville 2013, arXiv:1308.3432, section 4, for gradients straight through;
Esser et al. 2020 (LSQ), arXiv:1902.08153, eq. 3, for the step's.
Differs: the step's logarithm is trained, so that it stays positive.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.forms.affine import as_matrix, from_matrix
from tersor.forms.form import Form, Part, check_axis
from tersor.forms.trellis import Trellis, narrowest

_HASTE = 10.0
"""A step changes by so many times the share that the rate of an optimizer says."""


class Rounded(Form):
    """weight = round(latent / step) * step,   step = start * exp(10 * drift)

    latent: (outputs, inputs) float32, trained
    start: () float32
    drift: () float32, trained
    """

    kind = "rounded"
    training_only = True

    def __init__(
        self, latent: Tensor, start: Tensor, *, axis: int | None, shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """Use `encode` to make one from a weight."""
        super().__init__(shape, dtype)
        self.axis = axis
        self.latent = nn.Parameter(latent.contiguous())
        self.drift = nn.Parameter(torch.zeros_like(start))
        self.register_buffer("start", start)
        self.start: Tensor

    @classmethod
    def encode(cls, weight: Tensor, *, step: float, axis: int | None = 0) -> Self:
        """Starts from the weight. step: > 0"""
        check_axis(tuple(weight.shape), axis, none="one row")
        matrix = as_matrix(weight.detach().float(), axis).clone()
        start = torch.tensor(step, dtype=torch.float32, device=weight.device)
        return cls(matrix, start, axis=axis, shape=tuple(weight.shape), dtype=weight.dtype)

    @property
    def step(self) -> Tensor:
        """() > 0."""
        return self.start * (_HASTE * self.drift).exp()

    def levels(self) -> Tensor:
        """(outputs, inputs) the latent weight in units of its step."""
        return self.latent / self.step

    def dense(self) -> Tensor:
        """The rounded weight; gradients reach the latent one and the step."""
        levels = self.levels()
        matrix = (levels + (levels.round() - levels).detach()) * self.step
        return from_matrix(matrix, self.shape, self.axis).to(self.dtype)

    def freeze(self) -> Trellis:
        """The deployed form; its weight equals `dense()` exactly."""
        step = self.step.detach().reshape(1, 1)
        return Trellis(
            narrowest(self.levels().detach().round()),
            step,
            states=1,
            axis=self.axis,
            shape=self.shape,
            dtype=self.dtype,
        )

    def parts(self) -> tuple[Part, ...]:
        """What is trained; what is stored in the end depends on the codes."""
        return (("latent", 32), ("start", 32), ("drift", 32))

    def config(self) -> dict[str, Any]:
        """Layout."""
        return {"axis": self.axis}
