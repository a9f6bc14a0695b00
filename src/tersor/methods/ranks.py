"""Ranks: how much of each layer is kept, so that all together lose least within what may remain.

Each layer has ways to be factorized, and one to stay whole, each with what it costs and loses. It
is the knapsack of `allocate`, over bytes, multiply-accumulates or milliseconds alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tersor.errors import BudgetError, OptionError
from tersor.methods.allocate import allocate

_UNITS = 1 << 40
"""All layers as they are cost so many; ways are rounded up to whole ones."""
_MOST = 192
"""Ways of a layer that are compared, those that lose least evenly over their costs."""


@dataclass(frozen=True)
class Way:
    """One way to keep a layer.

    ranks: () for the whole layer
    cost: in the unit that is to be saved
    loss: in units that layers can be compared in
    """

    ranks: tuple[int, ...]
    cost: float
    loss: float


def chosen(ways: Mapping[str, Sequence[Way]], keep: float) -> dict[str, Way]:
    """The way of each layer.

    ways: by layer, the whole one first
    keep: of the costs of all whole layers, what those chosen may sum to

    Raises OptionError where even the least of each costs more.
    """
    total = sum(each[0].cost for each in ways.values())
    unit = total / _UNITS if total else 1.0
    few = {name: _few(each) for name, each in ways.items()}
    costs = [[(max(1, -int(-w.cost // unit)), w.loss) for w in each] for each in few.values()]
    try:
        taken = allocate(costs, int(keep * _UNITS))
    except BudgetError:
        least = sum(min(w.cost for w in each) for each in few.values()) / total
        raise OptionError(
            f"keep={keep} is less than the smallest ranks of all {len(ways)} layers, which keep "
            f"{least:.3f}; keep more"
        ) from None
    return {name: few[name][at] for name, at in zip(few, taken, strict=True)}


def _few(ways: Sequence[Way]) -> list[Way]:
    """Without those that another one beats in both, at most so many as are compared."""
    best: list[Way] = []
    for way in sorted(ways, key=lambda way: (way.cost, way.loss)):
        if not best or way.loss < best[-1].loss:
            best.append(way)
    if len(best) <= _MOST:
        return best
    step = (best[-1].cost - best[0].cost) / (_MOST - 1)
    kept = {int((way.cost - best[0].cost) / step): way for way in best}
    return [best[0], *(way for way in kept.values() if way is not best[0])]
