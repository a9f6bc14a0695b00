"""k-means in one dimension: a few values for many numbers, by their error and by what codes cost.

A cluster of numbers on a line is a stretch of them once sorted, so each round of Lloyd's iteration
takes a search for the stretches' ends in running sums, and the best clustering of all can be found
by dynamic programming.

Source: Han, Mao, Dally 2016, arXiv:1510.00149, section 3.2, for the starts; Wang, Song 2011,
"Ckmeans.1d.dp", R Journal 3(2), for the best; Choi, El-Khamy, Lee 2017, arXiv:1612.01543,
eq. 6 to 8, for numbers that count differently, and section 4.2 for values priced by their bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Start = Literal["linear", "density", "random", "best"]

# Among millions of numbers the last rounds move next to nothing, and rounding could go in circles.
_MOST_ROUNDS = 1_000
_LEAST = 1e-9
# Where "best" may cut between two clusters: so many places by rank, and as many by value.
_PLACES = 512


@dataclass(frozen=True)
class Values:
    """What numbers may become. Each takes the value for which (x - value)^2 + price is least.

    values, prices: (k,); at equal cost the lower value is taken, of equal values the cheaper, then
        the first
    """

    values: Tensor
    prices: Tensor

    @classmethod
    def free(cls, values: Tensor) -> Values:
        """Those that cost nothing: the nearest is taken."""
        return cls(values, torch.zeros_like(values))

    @cached_property
    def taken(self) -> tuple[Tensor, Tensor]:
        """Codes that some number takes, by rising value, and the (n - 1,) borders between them."""
        values, prices = self.values.tolist(), self.prices.tolist()
        kept: list[int] = []
        borders: list[float] = []
        for code in sorted(range(len(values)), key=lambda i: (values[i], prices[i])):
            if kept and values[code] == values[kept[-1]]:
                continue
            while kept:
                low = values[kept[-1]]
                border = (low + values[code]) / 2
                border += (prices[code] - prices[kept[-1]]) / (2 * (values[code] - low))
                if not borders or border > borders[-1]:
                    borders.append(border)
                    break
                kept.pop()
                borders.pop()
            kept.append(code)
        device, dtype = self.values.device, self.values.dtype
        return (
            torch.tensor(kept, device=device),
            torch.tensor(borders, device=device, dtype=dtype),
        )

    def codes(self, numbers: Tensor) -> Tensor:
        """int64, of the shape of the numbers."""
        kept, borders = self.taken
        return kept[torch.bucketize(numbers, borders)]


def clusters(
    numbers: Tensor,
    count: int,
    start: Start = "linear",
    *,
    importance: Tensor | None = None,
    thrift: float = 0.0,
    generator: torch.Generator | None = None,
) -> Values:
    """At most `count` values, sorted: each the mean of the numbers that take it. float64.

    start: "linear", even from the smallest to the largest number; "density", each the middle of as
        many numbers; "random", some of the numbers; "best", the least squared error there is
    importance: positive, of the shape of the numbers: what the squared error of each counts
    thrift: price of a bit, in what a bit saves in squared error where there are many
    generator: draws the random start

    No more distinct numbers than `count` are given back as they are.
    """
    ordered, order = numbers.detach().flatten().double().sort()
    distinct: Tensor = torch.unique_consecutive(ordered)
    if distinct.numel() <= count:
        return Values.free(distinct)
    mass = torch.ones_like(ordered)
    if importance is not None:
        mass = importance.detach().flatten().double()[order]
        # A cluster of numbers that count nothing has a mean all the same.
        mass = (mass / mass.mean()).clamp(min=_LEAST)
    line = _Line(ordered, mass)
    centers = line.start(count, start, generator)
    # At high rate the squared error falls to a quarter with each bit: by 2 ln 2 of it at first.
    if thrift:
        return line.priced(centers, thrift * 2 * math.log(2) * line.error(centers))
    return Values.free(line.lloyd(centers))


class _Line:
    """Sorted numbers with what their errors count, and running sums of both."""

    def __init__(self, ordered: Tensor, mass: Tensor) -> None:
        self.ordered, self.mass = ordered, mass
        self._mass = pad(mass.cumsum(0), (1, 0))
        self._sum = pad((mass * ordered).cumsum(0), (1, 0))

    def start(self, count: int, start: Start, generator: torch.Generator | None) -> Tensor:
        """(count,), sorted."""
        size, ordered = self.ordered.numel(), self.ordered
        steps = torch.arange(count, dtype=ordered.dtype, device=ordered.device)
        match start:
            case "linear":
                return ordered[0] + steps / max(1, count - 1) * (ordered[-1] - ordered[0])
            case "density":
                return ordered[((steps + 0.5) / count * size).long()]
            case "random":
                drawn = torch.randperm(size, generator=generator)[:count]
                return ordered[drawn.sort().values.to(ordered.device)]
        return self._best(count)

    def error(self, centers: Tensor) -> float:
        """Mean squared error where each number takes the nearest."""
        found = centers[Values.free(centers).codes(self.ordered)]
        return float((self.mass * (self.ordered - found).square()).mean())

    def lloyd(self, centers: Tensor) -> Tensor:
        """Lloyd's iteration from sorted centers; every one keeps some numbers."""
        edges: Tensor | None = None
        for _ in range(_MOST_ROUNDS):
            before, edges = edges, self._edges((centers[1:] + centers[:-1]) / 2)
            if before is not None and torch.equal(before, edges):
                break
            full = edges.diff() > 0
            means = self._sum[edges].diff() / self._mass[edges].diff()
            centers = torch.where(full, means, centers)
            if not full.all():
                centers = self._refilled(edges, centers)
        return centers

    def priced(self, centers: Tensor, bit: float) -> Values:
        """The same where a bit costs `bit`; values that no number takes are dropped.

        A value costs the bits that its share of the mass is worth, so neither error nor price
        rises in any round.
        """
        found, edges = Values.free(centers), self._edges(centers[:0])
        for _ in range(_MOST_ROUNDS):
            before, edges = edges, self._edges(found.taken[1])
            if torch.equal(before, edges):
                break
            edges = torch.unique_consecutive(edges)
            mass = self._mass[edges].diff()
            found = Values(self._sum[edges].diff() / mass, bit * (mass.sum() / mass).log2())
        return found

    def _edges(self, borders: Tensor) -> Tensor:
        """Where the stretches between the borders start, and the end."""
        inner = torch.searchsorted(self.ordered, borders, right=True)
        return torch.cat((inner.new_tensor([0]), inner, inner.new_tensor([len(self.ordered)])))

    def _refilled(self, edges: Tensor, centers: Tensor) -> Tensor:
        """Moves one cluster without numbers to the number that is farthest from its center."""
        full = edges.diff() > 0
        last = self.ordered.numel() - 1
        low = self.ordered[edges[:-1].clamp(max=last)]
        high = self.ordered[(edges[1:] - 1).clamp(min=0)]
        far = torch.where(centers - low > high - centers, low, high)
        distance = torch.where(full, (far - centers).abs(), -1)
        moved = centers.clone()
        moved[int((~full).nonzero()[0])] = far[distance.argmax()]
        return moved.sort().values

    def _best(self, count: int) -> Tensor:
        """Exact where there are no more numbers than places to cut at, near it otherwise.

        least[i] of j clusters is what the numbers before place i cost; one cluster more is the
        minimum over where it starts.
        """
        places = self._places()
        mass, total = self._mass[places], self._sum[places]
        square = pad((self.mass * self.ordered.square()).cumsum(0), (1, 0))[places]
        # Of a cluster that ends at place i and starts at place j, (i, j).
        inside, sums = mass[:, None] - mass, total[:, None] - total
        cost = (square[:, None] - square) - sums.square() / inside
        cost = cost.clamp(min=0).masked_fill(torch.ones_like(cost).triu() > 0, torch.inf)
        least, starts = cost[:, 0], []
        for _ in range(count - 1):
            least, start = (least + cost).min(1)
            starts.append(start)
        ends = [len(places) - 1]
        for start in reversed(starts):
            ends.append(int(start[ends[-1]]))
        cut = torch.tensor([0, *reversed(ends)], device=mass.device)
        return total[cut].diff() / mass[cut].diff()

    def _places(self) -> Tensor:
        """Where clusters may end: all places between distinct numbers, or some of them."""
        size, ordered = self.ordered.numel(), self.ordered
        between = (ordered.diff() > 0).nonzero()[:, 0] + 1
        if between.numel() > 2 * _PLACES:
            ranks = torch.linspace(0, between.numel() - 1, _PLACES, device=ordered.device).long()
            evenly = torch.linspace(0, 1, _PLACES, dtype=ordered.dtype, device=ordered.device)
            values = ordered[0] + evenly * (ordered[-1] - ordered[0])
            nearest = torch.searchsorted(ordered[between], values).clamp(max=between.numel() - 1)
            chosen = torch.cat((ranks, nearest)).sort().values
            between = between[torch.unique_consecutive(chosen)]
        return torch.cat((between.new_tensor([0]), between, between.new_tensor([size])))
