"""Learned grid: an activation grid whose scale is trained with the network.

Source: Esser et al. 2020 (LSQ), arXiv:1902.08153, eqs. 1-3 and section 2.2 (gradient scale).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.forms.grid import Grid, Rounding


class LearnedGrid(Rounding):
    """x -> clamp(round(x / scale), low, high) * scale, low = -2**(bits-1) if signed, 0 otherwise

    scale: () float32, trained; below the smallest normal number it counts as that
    bits: 2 to 8

    Within the range x passes its gradient on, and the scale gets round(x / scale) - x / scale; from
    outside x passes none, and the scale gets low or high: all times 1 / sqrt(high * values of one
    sample).
    """

    def __init__(self, scale: Tensor | float, *, bits: int, signed: bool) -> None:
        """Raises OptionError for what is no grid."""
        super().__init__()
        grid = Grid(scale, 0, bits=bits, signed=signed)
        self.bits, self.signed, self.low, self.high = bits, signed, grid.low, grid.high
        self.scale = nn.Parameter(grid.scale)

    @classmethod
    def starting(cls, mean_size: float, *, bits: int, signed: bool) -> LearnedGrid:
        """With LSQ's first scale, 2 mean|x| / sqrt(high). mean_size: mean|x|"""
        high = 2 ** (bits - signed) - 1
        scale = max(2 * mean_size / high**0.5, torch.finfo(torch.float32).tiny)
        return cls(scale, bits=bits, signed=signed)

    @property
    def kind(self) -> str:
        """ "learned grid"; a file never holds one."""
        return "learned grid"

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded."""
        scale = self._scale()
        damped = scale / (self.high * max(1, x[:1].numel())) ** 0.5
        scale = scale.detach() + (damped - damped.detach())
        steps = torch.clamp(x.float() / scale, self.low, self.high)
        whole = torch.round(steps).detach() + (steps - steps.detach())
        rounded: Tensor = whole * scale
        return rounded.to(x.dtype)

    def freeze(self) -> Grid:
        """The deployed grid; what it gives is equal bit for bit."""
        return Grid(self._scale().detach(), 0, bits=self.bits, signed=self.signed)

    def _scale(self) -> Tensor:
        return self.scale.clamp(min=torch.finfo(torch.float32).tiny)
