"""Hard-concrete form: a float weight times random gates that may be exactly 0 or 1, for training.

Source: Louizos, Welling, Kingma 2018, arXiv:1712.01312, eqs. 10-13, with their temperature and
limits.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.forms.bitmask import Bitmask
from tersor.forms.form import Form, Part

# beta, gamma and zeta of the paper.
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1


class HardConcrete(Form):
    """weight = latent * gates

    gates = clamp(s * (high - low) + low, 0, 1); where gradients are recorded and there is noise u,
    s = sigmoid((log u - log(1 - u) + openness) / temperature), else s = sigmoid(openness)

    latent: float, of the weight's shape, trained
    openness: log alpha of the paper, of the weight's shape; or of size 1 along all dimensions but
        one, where each row has one gate
    noise: like openness, in (0, 1), or None
    """

    kind = "hard_concrete"
    training_only = True

    def __init__(self, latent: Tensor, openness: Tensor) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(tuple(latent.shape), latent.dtype)
        self.latent = nn.Parameter(latent.contiguous())
        self.openness = nn.Parameter(openness.contiguous())
        self.noise: Tensor | None = None

    @classmethod
    def encode(
        cls,
        weight: Tensor,
        *,
        start: float,
        axis: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Starts with the weight, and gates as open as `start`, give or take 0.01.

        axis: whose every index has one gate; None for a gate for each weight
        """
        shape = [n if axis in (None, at) else 1 for at, n in enumerate(weight.shape)]
        lots = torch.randn(shape, generator=generator).to(weight.device)
        return cls(weight.detach().clone(), start + 0.01 * lots)

    def gates(self) -> Tensor:
        """In 0..1, of the shape of `openness`; eq. 10 and 11, or eq. 13."""
        if self.noise is not None and torch.is_grad_enabled():
            share = torch.sigmoid((torch.logit(self.noise) + self.openness) / _TEMPERATURE)
        else:
            share = torch.sigmoid(self.openness)
        return (share * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def chance(self) -> Tensor:
        """That a gate with noise is not 0, eq. 12; of the shape of `openness`."""
        return torch.sigmoid(self.openness - _TEMPERATURE * math.log(-_LOW / _HIGH))

    def dense(self) -> Tensor:
        """The weight, as far as gates let it through."""
        return (self.latent * self.gates()).to(self.dtype)

    def freeze(self) -> Bitmask:
        """The deployed form; its weight equals `dense()` without noise exactly."""
        with torch.no_grad():
            return Bitmask.encode(self.dense())

    def parts(self) -> tuple[Part, ...]:
        """What is trained; frozen it is less."""
        return tuple(
            (name, getattr(self, name).element_size() * 8) for name in ("latent", "openness")
        )

    def config(self) -> dict[str, Any]:
        """Nothing: the tensors say it all."""
        return {}
