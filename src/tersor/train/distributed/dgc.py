"""Deep gradient compression: the largest values of a velocity that each worker gathers itself.

For a thousandth of the values and less, where `TopK` in front of an optimizer with momentum would
apply gradients late and out of step. It is the momentum: the optimizer behind it must have none.

Source: Lin, Han, Mao, Wang, Dally 2018, arXiv:1712.01887, algorithm 4 (momentum correction, local
clipping, momentum factor masking) and section 3.3 (warm-up).
Differs from the paper: a fixed number of values is sent instead of those above a sampled
threshold; the warm-up is counted in steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.train.distributed.compressor import Compressor, check_share
from tersor.train.distributed.exchange import Talk
from tersor.train.distributed.sparse import exchange_at, largest

_STAGES = 4
"""Of the warm-up; the share falls to a quarter from each to the next."""


class DGC(Compressor):
    """With gradient G: U = momentum * U + G, V = V + U; the largest V are sent.

    Where V was sent, U and V are zero behind it. `kept` is V, so on each worker
    sent + kept = U + kept before.

    share: of the values of a tensor, above 0 and at most 1
    momentum: 0 to below 1
    clip: the largest length of all of a worker's gradients together, above 0; a limit for the mean
        of W workers is to be divided by the root of W (section 3.2). None does not clip
    warmup: steps in which the share falls to its value: 1/4, 1/16, 1/64, 1/256 of the values, each
        in a quarter of them
    """

    def __init__(
        self,
        share: float = 0.001,
        *,
        momentum: float = 0.9,
        clip: float | None = None,
        warmup: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise OptionError(f"momentum={momentum!r} must be at least 0 and below 1; try 0.9")
        if clip is not None and not clip > 0:
            raise OptionError(f"clip={clip!r} must be above 0; None does not clip")
        if warmup < 0:
            raise OptionError(f"warmup={warmup!r} steps must be at least 0; 0 has no warm-up")
        self._share, self.momentum = check_share(share), momentum
        self._clip, self._warmup = clip, warmup
        self._velocity: list[Tensor] = []
        self._step = 0

    @property
    def share(self) -> float:
        """Of the values that the next step sends."""
        if self._step >= self._warmup:
            return self._share
        stage = self._step * _STAGES // self._warmup
        return max(self._share, 0.25 ** (1 + stage))

    def state(self) -> dict[str, Any]:
        """With U and the number of steps so far."""
        return {**super().state(), "velocity": self._velocity, "step": self._step}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        super().restore(state)
        self._velocity, self._step = list(state["velocity"]), state["step"]

    def _wanted(self, gradients: list[Tensor]) -> list[Tensor]:
        gradients = self._clipped(gradients)
        if self._velocity:
            gradients = [
                self.momentum * velocity.to(gradient.device) + gradient
                for velocity, gradient in zip(self._velocity, gradients, strict=True)
            ]
        self._velocity = gradients
        return super()._wanted(gradients)

    def _exchange(self, wanted: list[Tensor]) -> Talk[tuple[list[Tensor], list[Tensor]]]:
        places = [largest(tensor, self.share) for tensor in wanted]
        self._step += 1
        self._velocity = [
            velocity.reshape(-1).index_fill(0, at, 0.0).view_as(velocity)
            for velocity, at in zip(self._velocity, places, strict=True)
        ]
        return (yield from exchange_at(wanted, places))

    def _clipped(self, gradients: list[Tensor]) -> list[Tensor]:
        if self._clip is None:
            return gradients
        length = torch.stack([gradient.norm() for gradient in gradients]).norm()
        share = (self._clip / length.clamp(min=1e-12)).clamp(max=1.0)
        return [gradient * share for gradient in gradients]
