"""What enters linear layers: some of the rows, and the largest value of each channel."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.measure import evaluating
from tersor.measure.running import unfused
from tersor.task import Inputs, Task

MOST = 512
"""Rows that are kept of a layer."""


@dataclass
class Rows:
    """some: (rows, channels), spread over all that was seen. low, high: (channels,) of all"""

    low: Tensor
    high: Tensor
    kept: list[Tensor] = field(default_factory=list)

    @property
    def largest(self) -> Tensor:
        """(channels,) of |x|."""
        return self.high.maximum(-self.low)

    @property
    def some(self) -> Tensor:
        rows = torch.cat(self.kept)
        return rows[:: -(-len(rows) // MOST)]


def inputs_of(
    model: nn.Module, task: Task, batches: Sequence[Inputs], layers: Sequence[nn.Module]
) -> dict[nn.Module, Rows]:
    """What enters each layer on these batches. Raises ModelError unless all is finite."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, Rows] = {}

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = next(iter((*args, *kwargs.values()))).detach().flatten(0, -2)
        low, high = rows.aminmax(dim=0)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise ModelError(
                f'the input of "{names[layer]}" with {rows.shape[1]} channels holds NaN or '
                f'infinity for a calibration batch; check it, or exclude="{names[layer]}"'
            )
        seen = found.setdefault(layer, Rows(low, high))
        seen.low, seen.high = seen.low.minimum(low), seen.high.maximum(high)
        seen.kept.append(rows[:: -(-len(rows) // MOST)].clone())

    with evaluating(model), unfused(), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(look, with_kwargs=True).remove)
        for batch in batches:
            task.predict(model, batch)
    return found
