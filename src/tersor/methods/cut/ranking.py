"""Ranking: which units of all groups go, until what is left costs no more than asked for.

Source: Molchanov et al. 2017, arXiv:1611.06440, section 2.3, for one ranking of all groups; Liu et
al. 2021, arXiv:2108.00708, eq. 9, for harm by what is saved.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tersor.errors import BudgetError
from tersor.methods.cut.removing import Costs, Removable

_LEAST = 16
"""One in so many units of a group stays, whatever a ranking says, and at least one."""


@dataclass(frozen=True)
class Ranking:
    """Units of a group, the most dispensable first.

    order: their numbers; the last ones, which no criterion would remove, may be missing
    harms: what each adds, >= 0, when those before it are gone
    """

    order: list[int]
    harms: list[float]

    @classmethod
    def of(cls, scores: Tensor, *, shares: bool) -> Ranking:
        """By scores (units,), the lowest first. shares: of their mean"""
        scores = scores.double()
        if shares:
            scores = scores / scores.mean().clamp(min=1e-30)
        order = scores.argsort(stable=True)
        return cls(order.tolist(), scores[order].tolist())


def chosen(
    groups: Sequence[Removable],
    rankings: Sequence[Ranking],
    costs: Costs,
    goal: float,
    *,
    steps: Sequence[int],
    by_saving: bool,
) -> list[list[int]]:
    """Units of each group to remove, so that the costs come down to the goal.

    costs: as they are; they are counted down
    steps: of each group, units that go together
    by_saving: whether harms are compared by what is saved, as those of one kind for all groups can

    Raises BudgetError where all that may go is not enough.
    """
    gone = [0] * len(groups)
    heap: list[tuple[float, int]] = []

    def offer(number: int) -> None:
        group, ranking, step = groups[number], rankings[number], steps[number]
        least = max(1, -(-len(group) // _LEAST))
        after = gone[number] + step
        if after > min(len(group) - least, len(ranking.order)):
            return
        harm = sum(ranking.harms[gone[number] : after])
        saving = costs.saving(group.group, step)
        if saving > 0:
            heapq.heappush(heap, (harm / saving if by_saving else harm / step, number))

    for number in range(len(groups)):
        offer(number)
    while costs.total > goal:
        if not heap:
            raise BudgetError(f"at most {costs.total:.3g} of {goal:.3g} can be reached")
        _, number = heapq.heappop(heap)
        costs.remove(groups[number].group, steps[number])
        gone[number] += steps[number]
        offer(number)
    return [ranking.order[:count] for ranking, count in zip(rankings, gone, strict=True)]
