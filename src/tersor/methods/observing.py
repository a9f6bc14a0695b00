"""Looking at activations: a histogram of each place, all collected in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.forms.grid import Grid
from tersor.measure import evaluating
from tersor.measure.histogram import (
    Histogram,
    entropy_range,
    least_squares_range,
    percentile_range,
    whole_range,
)
from tersor.measure.running import unfused
from tersor.methods.placing import Place, Spot
from tersor.task import Inputs, Task

Observer = Literal["minmax", "percentile", "mse", "entropy"]


@dataclass(eq=False)
class Observed:
    """What passed through a spot. largest: (channels,) float, of |x|; empty before the first."""

    histogram: Histogram = field(default_factory=Histogram)
    largest: Tensor = field(default_factory=lambda: torch.empty(0))

    def grid(self, observer: Observer, bits: int) -> Grid:
        """The grid whose range the observer reads from the histogram."""
        if observer == "mse":
            low, high = least_squares_range(self.histogram, bits)
        else:
            rule = {
                "minmax": whole_range,
                "percentile": percentile_range,
                "entropy": entropy_range,
            }[observer]
            low, high = rule(self.histogram)
        return Grid.spanning(low, high, bits=bits).to(self.largest.device)

    @property
    def dead(self) -> int:
        """Channels that were never anything but zero, where others were."""
        return int((self.largest == 0).sum()) if self.largest.any() else 0


def observe(
    model: nn.Module, task: Task, batches: Sequence[Inputs], spots: Sequence[Spot]
) -> list[Observed]:
    """What passes through each spot on these batches. Raises ModelError unless all is finite."""
    names = {module: name for name, module in model.named_modules()}
    found = [Observed() for _ in spots]
    with evaluating(model), unfused(), ExitStack() as stack:
        for spot, observed in zip(spots, found, strict=True):
            for place in spot.seen():
                look = _looking(place, names[place[0]], observed)
                stack.callback(_hooked(place, look).remove)
        for batch in batches:
            task.predict(model, batch)
    return found


def _hooked(place: Place, look: Callable[[Any], None]) -> Any:
    module, where = place
    if where == "output":
        return module.register_forward_hook(lambda _, args, output: look(output))
    return module.register_forward_pre_hook(
        lambda _, args, kwargs: look(next(iter((*args, *kwargs.values())))), with_kwargs=True
    )


def _looking(place: Place, name: str, observed: Observed) -> Callable[[Any], None]:
    def look(values: Tensor) -> None:
        try:
            observed.histogram.add(values)
        except ValueError as error:
            raise ModelError(
                f'the {place[1]} of "{name}" of shape {tuple(values.shape)} cannot be quantized: '
                f"{error} for a calibration batch; check these inputs, or leave the layer out with "
                f'exclude="{name}"'
            ) from None
        # Convolutions have their channels second, linear layers last.
        axis = 1 if values.dim() > 3 else values.dim() - 1
        others = [n for n in range(values.dim()) if n != axis]
        largest = values.detach().float().abs().amax(others) if others else values.abs().float()
        if observed.largest.shape == largest.shape:
            largest = torch.maximum(largest, observed.largest)
        observed.largest = largest

    return look
