"""A few values of each gradient: the largest, or some at random. The rest waits with its worker.

`TopK` for gradients of which few values matter; its messages are gathered, so what a worker
receives grows with the number of workers. `RandomK` is the cheap one to compare with: workers draw
the same places, so no places are sent and values are averaged on the way.

Source: Stich, Cordonnier, Jaggi 2018, arXiv:1809.07599, definition 2.1 and algorithm 1.
Differs from the paper: k is a share of each tensor, and many workers average.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersor.train.distributed.compressor import Compressor, check_share
from tersor.train.distributed.exchange import Talk, gathered, mean
from tersor.train.distributed.packing import pack_places, unpack_places


class TopK(Compressor):
    """The largest values of each tensor, by magnitude.

    A step sends, for each value, 4 bytes and its place in the fewest whole bytes.

    share: of the values of a tensor, above 0 and at most 1; one value of each is always sent
    feedback: see `Compressor`
    """

    def __init__(self, share: float = 0.01, *, feedback: bool = True) -> None:
        super().__init__(feedback=feedback)
        self._share = check_share(share)

    def _exchange(self, wanted: list[Tensor]) -> Talk[tuple[list[Tensor], list[Tensor]]]:
        places = [largest(tensor, self._share) for tensor in wanted]
        return (yield from exchange_at(wanted, places))


class RandomK(Compressor):
    """Values of each tensor at places that are drawn anew for each step.

    A step sends 4 bytes for each value. They are not scaled up: with feedback, what waits is sent
    later.

    share: of the values of a tensor, above 0 and at most 1; one value of each is always sent
    feedback: see `Compressor`
    seed: of the places, the same on every worker
    """

    def __init__(self, share: float = 0.01, *, feedback: bool = True, seed: int = 0) -> None:
        super().__init__(feedback=feedback)
        self._share, self._seed, self._step = check_share(share), seed, 0

    def _exchange(self, wanted: list[Tensor]) -> Talk[tuple[list[Tensor], list[Tensor]]]:
        generator = torch.Generator().manual_seed(self._seed + self._step)
        self._step += 1
        places = [
            torch.randperm(t.numel(), generator=generator)[: count(t, self._share)].to(t.device)
            for t in wanted
        ]
        values = [t.reshape(-1)[at] for t, at in zip(wanted, places, strict=True)]
        means = yield from mean(values)
        sent = [spread(v, at, t) for v, at, t in zip(values, places, wanted, strict=True)]
        averaged = [spread(v, at, t) for v, at, t in zip(means, places, wanted, strict=True)]
        return sent, averaged

    def state(self) -> dict[str, Any]:
        """With the number of steps so far."""
        return {**super().state(), "step": self._step}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        super().restore(state)
        self._step = state["step"]


def count(tensor: Tensor, share: float) -> int:
    """How many values `share` of a tensor is, at least one."""
    return min(tensor.numel(), max(1, math.ceil(share * tensor.numel())))


def largest(tensor: Tensor, share: float) -> Tensor:
    """(k,) places of the largest values by magnitude, in the tensor as a row."""
    return tensor.reshape(-1).abs().topk(count(tensor, share), sorted=False).indices


def exchange_at(
    wanted: list[Tensor], places: list[Tensor]
) -> Talk[tuple[list[Tensor], list[Tensor]]]:
    """Sends the values at this worker's places, and the places. Returns as `_exchange` does."""
    values = [tensor.reshape(-1)[at] for tensor, at in zip(wanted, places, strict=True)]
    packed = [pack_places(at, t.numel()) for t, at in zip(wanted, places, strict=True)]

    def read(everyone: list[list[Tensor]]) -> list[Tensor]:
        total = [torch.zeros_like(tensor).reshape(-1) for tensor in wanted]
        # One worker after another: the places of one differ, so each rank adds in the same order.
        for own in everyone:
            for row, value, at in zip(total, own[: len(wanted)], own[len(wanted) :], strict=True):
                row.index_add_(0, unpack_places(at), value)
        means = [row / len(everyone) for row in total]
        return [row.view_as(tensor) for row, tensor in zip(means, wanted, strict=True)]

    averaged = yield from gathered([*values, *packed], read)
    sent = [spread(v, at, t) for v, at, t in zip(values, places, wanted, strict=True)]
    return sent, averaged


def spread(values: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """`values` at `places` of a tensor of the shape of `like`, zero elsewhere."""
    row = torch.zeros(like.numel(), dtype=values.dtype, device=values.device)
    return row.index_copy_(0, places, values).view(like.shape)
