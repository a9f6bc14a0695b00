"""The clock: what a layer or a chain costs, in bytes, multiply-accumulates or milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from tersor.measure.latency import time_call
from tersor.measure.running import wait
from tersor.surgery.chain import chain_for
from tersor.surgery.links import LINEAR, Ranks, sizes_of, work
from tersor.surgery.walk import kind_of

Of = Literal["bytes", "macs", "latency"]
"""What may be counted."""
Calls = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
_TIMED = 4
"""Chains of a layer that are timed; others lie between them by their multiply-accumulates."""
_REPEATS = 30


class Clock:
    """Costs of chains of one kind; layers of one shape are timed once."""

    def __init__(self, of: Of, made_by: str) -> None:
        self.of, self.made_by = of, made_by
        self._times: dict[Any, tuple[list[float], list[float], float]] = {}

    def costs(
        self, layer: nn.Module, calls: Calls, ranks: Sequence[Ranks]
    ) -> Callable[[Ranks], float]:
        """What ranks cost, () the whole layer.

        calls: shapes of what it takes and gives; ranks: those that will be asked for
        """
        if self.of == "bytes":
            size = cast("Tensor", layer.weight).element_size()
            return lambda each: float(size * self.numbers(layer, each))
        counts = {each: self._macs(layer, calls, each) for each in [(), *ranks]}
        if self.of == "macs":
            return counts.__getitem__
        key = (kind_of(layer), sizes_of(layer), str(layer), tuple(calls), tuple(ranks))
        if key not in self._times:
            self._times[key] = self._timed(layer, calls, ranks, counts)
        macs, times, whole = self._times[key]
        return lambda each: float(np.interp(counts[each], macs, times)) if each else whole

    def numbers(self, layer: nn.Module, ranks: Ranks) -> int:
        """Weights of a chain, or of the whole layer."""
        outputs, inputs, *kernel = sizes_of(layer)
        if not ranks:
            return outputs * inputs * math.prod(kernel)
        place = [1] * len(kernel)
        links = work(layer, self.made_by, ranks, (1, inputs, *place), (1, outputs, *place))
        return sum(numbers for numbers, _ in links)

    def _macs(self, layer: nn.Module, calls: Calls, ranks: Ranks) -> float:
        if ranks:
            each = [work(layer, self.made_by, ranks, *call) for call in calls]
            return float(sum(n * uses for links in each for n, uses in links))
        outputs, inputs, *kernel = sizes_of(layer)
        numbers = outputs * inputs * math.prod(kernel)
        if kind_of(layer) in LINEAR:
            return float(sum(numbers * math.prod(given) // inputs for given, _ in calls))
        return float(sum(numbers * gives[0] * math.prod(gives[2:]) for _, gives in calls))

    def _timed(
        self, layer: nn.Module, calls: Calls, ranks: Sequence[Ranks], counts: dict[Ranks, float]
    ) -> tuple[list[float], list[float], float]:
        """Multiply-accumulates of some chains, rising, their milliseconds, and the layer's."""
        rising = sorted(ranks, key=counts.__getitem__)
        spread = np.linspace(0, len(rising) - 1, min(_TIMED, len(rising))).astype(int)
        few = [rising[at] for at in dict.fromkeys(spread.tolist())]
        times = [_milliseconds(self._chain(layer, each), calls) for each in few]
        # A chain is no faster for more ranks; what says so is noise.
        rising_times = np.maximum.accumulate(times).tolist() if times else []
        return [counts[each] for each in few], rising_times, _milliseconds(layer, calls)

    def _chain(self, layer: nn.Module, ranks: Ranks) -> nn.Module:
        """With zeros for weights: what memory held before may be slow to compute with."""
        chain = chain_for(layer, self.made_by, ranks)
        for name, parameter in chain.named_parameters():
            if name.endswith("weight"):
                nn.init.zeros_(parameter)
        return chain


def _milliseconds(layer: nn.Module, calls: Calls) -> float:
    weight = next(layer.parameters())
    inputs = [torch.zeros(given, dtype=weight.dtype, device=weight.device) for given, _ in calls]

    def run() -> None:
        for x in inputs:
            layer(x)
        wait(weight.device)

    with torch.no_grad():
        return time_call(run, repeats=_REPEATS).median_ms
