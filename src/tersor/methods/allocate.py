"""Allocation: one option for each weight, so that the summed loss is least within the bytes.

A multiple-choice knapsack, solved by dynamic programming over bytes in cells, sizes rounded up (so
a plan never exceeds the limit), then improved greedily with the bytes that the rounding left.

Source: the problem as in Dong et al. 2020 (HAWQ-V2), arXiv:1911.03852, eq. 8; the cost here is a
measured divergence instead of a trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tersor.errors import BudgetError

_CELLS = 8192


def allocate(options: Sequence[Sequence[tuple[int, float]]], limit: int) -> list[int]:
    """The option to take for each weight.

    options: for each weight its (bytes, loss) pairs, bytes > 0, loss >= 0
    limit: bytes that all taken options may sum to

    Exact while limit <= 8192 cells of one byte; above, within the loss that 1 part in 8192 of the
    bytes per weight can buy. Raises BudgetError when even the smallest options exceed the limit.
    """
    least = sum(min(size for size, _ in choices) for choices in options)
    if least > limit:
        raise BudgetError(
            f"the smallest options of all weights sum to {least:,} bytes, above the {limit:,} "
            "available"
        )
    cell = max(1, limit // _CELLS)
    # Rounding up could make a tight limit infeasible; then the smallest plan is the only one left.
    taken = _dynamic(options, cell, limit // cell)
    if taken is None:
        taken = [min(range(len(c)), key=lambda i: c[i]) for c in options]
    return _spend_the_rest(options, taken, limit)


def _dynamic(
    options: Sequence[Sequence[tuple[int, float]]], cell: int, cells: int
) -> list[int] | None:
    best = np.zeros(cells + 1)
    picks = []
    for choices in options:
        totals = np.full((len(choices), cells + 1), np.inf)
        for row, (size, loss) in enumerate(choices):
            used = -(-size // cell)
            if used <= cells:
                totals[row, used:] = best[: cells + 1 - used] + loss
        pick = totals.argmin(0)
        best = totals[pick, np.arange(cells + 1)]
        picks.append(pick.astype(np.int16))
    if not np.isfinite(best[cells]):
        return None
    taken, left = [], cells
    for choices, pick in zip(reversed(options), reversed(picks), strict=True):
        taken.append(int(pick[left]))
        left -= -(-choices[taken[-1]][0] // cell)
    return taken[::-1]


def _spend_the_rest(
    options: Sequence[Sequence[tuple[int, float]]], taken: list[int], limit: int
) -> list[int]:
    taken = list(taken)
    rest = limit - sum(choices[t][0] for choices, t in zip(options, taken, strict=True))
    while True:
        gains = [
            (now[1] - loss, -(size - now[0]), -i, -o)
            for i, choices in enumerate(options)
            for now in [choices[taken[i]]]
            for o, (size, loss) in enumerate(choices)
            if loss < now[1] and size - now[0] <= rest
        ]
        if not gains:
            return taken
        _, saved, i, o = max(gains)
        taken[-i] = -o
        rest += saved
