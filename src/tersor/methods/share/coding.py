"""Codes of a codebook, column after column, each making up for the errors of those before it.

Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, algorithm 1, with levels of any spacing; Han,
Mao, Dally 2016, arXiv:1510.00149, section 3.3, for values fitted to the codes, here in one step, by
least squares in place of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.methods.columns import Levels, Problem, Rounding
from tersor.methods.share.clusters import Values

# Steps of conjugate gradients for the values; each step uses every moment once.
_STEPS = 16


class Coding(Rounding):
    """Rows of a weight on their way to the codes of a codebook that is shared with other rows.

    The weight is scale[o] * values[codes]; the value of code 0 is zero where there are zeros.
    """

    def __init__(self, problem: Problem, scale: Tensor, importance: Tensor, book: Values) -> None:
        """scale: (outputs, 1); importance: (outputs,) of the rows' errors."""
        count = book.values.numel()
        super().__init__(problem, Levels(scale, torch.zeros_like(scale), 0, count - 1, None))
        self._importance, self._book = importance, book

    def rebook(self, book: Values) -> None:
        """Lets the codes stand for other values."""
        self._book, self._pull = book, None

    def pulls(self) -> Tensor:
        """Of every value, what a small change of it would gain, (k,)."""
        return self._by_value(self._pulled())

    def curved(self, change: Tensor) -> Tensor:
        """How much a change (k,) of the values takes from each of those."""
        moved = change[self._codes.long()] * self._scale
        return self._by_value(self._metric.times(moved))

    def curvature(self) -> Tensor:
        """Of every value alone, (k,)."""
        each = self._metric.energies[:, None] * self._scale
        return self._by_value(each.expand_as(self._codes))

    def _by_value(self, pulls: Tensor) -> Tensor:
        """Sums over the weights of each value. pulls: (inputs, outputs), of the weights"""
        weighed = (pulls * (self._scale[0] * self._importance)).double().flatten()
        sums = weighed.new_zeros(self._book.values.numel())
        return sums.index_add_(0, self._codes.long().flatten(), weighed)

    def _apart(self) -> Tensor:
        return self._book.values[self._codes.long()]

    def _nearest(self, column: int, value: Tensor) -> Tensor:
        code = self._book.codes(value / self._scale[0]).to(value.dtype)
        return code if self._zeros is None else torch.where(self._zeros[column], 0, code)

    def _value(self, column: int, code: Tensor) -> Tensor:
        return self._book.values[code.long()] * self._scale[0]


def fitted(codings: Sequence[Coding], values: Tensor, *, zero: bool) -> Tensor:
    """The values that suit the codes of all rows best, from those they have; unused ones stay.

    zero: whether the first stays as it is
    """
    found = values.double()
    left = sum((coding.pulls() for coding in codings), torch.zeros_like(found))
    scale = sum((coding.curvature() for coding in codings), torch.zeros_like(found))
    free = scale > 0
    if zero:
        free[0] = False
    inverse = torch.where(free, 1 / scale.where(free, torch.ones_like(scale)), 0)
    along, energy = inverse * left, float((inverse * left.square()).sum())
    for _ in range(min(_STEPS, found.numel())):
        change = along.to(values.dtype)
        bent = sum((coding.curved(change) for coding in codings), torch.zeros_like(found))
        curve = float((along * bent).sum())
        if not curve > 0 or not energy > 0:
            break
        found, left = found + energy / curve * along, left - energy / curve * bent
        before, energy = energy, float((inverse * left.square()).sum())
        along = inverse * left + energy / before * along
    return found.to(values.dtype)
