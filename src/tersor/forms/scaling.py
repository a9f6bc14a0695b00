"""Scaling: what a layer is given is multiplied channel by channel, as its weight was divided.

Where no layer before it can take the factors of `transform.smooth`, this carries them out.
"""

from __future__ import annotations

from torch import Tensor, nn


class Scaling(nn.Module):
    """x -> x * factor. factor: (channels,) float, along the last dimension of x"""

    kind = "scaling"

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.detach().clone().contiguous())
        self.factor: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """`x` scaled."""
        return x * self.factor

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"channels={len(self.factor)}"
