"""Criteria of removal: which units of a group go first, and how much harm each does.

A criterion is a function (Removable, Evidence) -> Ranking. Those that look at weights or
activations alone say nothing about how groups compare, so their harms are shares of the group's
mean; the others estimate what removing costs the whole network.

Source: of each criterion in its function; Fang et al. 2023 (DepGraph), arXiv:2301.12900, section
3.3, for shares of the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.forms.form import rows
from tersor.methods.cut.evidence import Evidence
from tersor.methods.cut.ranking import Ranking
from tersor.methods.cut.removing import End, Removable

Criterion = Callable[[Removable, Evidence], Ranking]


def l1(units: Removable, _: Evidence) -> Ranking:
    """Sum of the sizes of the weights that write a unit. Li et al. 2017, arXiv:1608.08710."""
    return Ranking.of(_written(units).abs().sum(1), shares=True)


def l2(units: Removable, _: Evidence) -> Ranking:
    """Length of the weights that write a unit, He et al. 2018 (SFP), arXiv:1808.06866, eq. 2."""
    return Ranking.of(_written(units).norm(dim=1), shares=True)


def group_norm(units: Removable, _: Evidence) -> Ranking:
    """Lengths of everything that goes with a unit, what reads it too. DepGraph, eq. 4."""
    lengths = [_lines(end, writes=True).norm(dim=1) for end in units.writers]
    lengths += [_lines(end, writes=False).norm(dim=1) for end in units.readers]
    return Ranking.of(torch.stack(lengths).sum(0), shares=True)


def geometric_median(units: Removable, _: Evidence) -> Ranking:
    """Distance to all other units: the nearest is the easiest replaced.

    He et al. 2019 (FPGM), arXiv:1811.00250, eq. 4.
    """
    written = _written(units)
    return Ranking.of(torch.cdist(written, written).sum(1), shares=True)


def activation(units: Removable, evidence: Evidence) -> Ranking:
    """Mean size of what a unit gives, as it is read. Molchanov et al. 2017, arXiv:1611.06440."""
    return Ranking.of(_read(units, evidence.sizes), shares=True)


def apoz(units: Removable, evidence: Evidence) -> Ranking:
    """How rarely a unit gives zero. Hu et al. 2016 (APoZ), arXiv:1607.03250, eq. 1."""
    return Ranking.of(1 - _read(units, evidence.zeros), shares=True)


def similarity(units: Removable, evidence: Evidence) -> Ranking:
    """What a unit tells that the most similar one left does not: 1 - cosine^2 of their outputs.

    One of two alike goes, and the other is then compared with those that stay. Srinivas, Babu
    2015, arXiv:1507.06149, section 3, with outputs in place of weights.
    """
    products = sum(_products(end, evidence) for end in units.readers)
    assert isinstance(products, Tensor)
    energies = products.diagonal().clamp(min=1e-30)
    alike = products.square() / energies[:, None] / energies
    alike.fill_diagonal_(-1)
    order, harms = list[int](), list[float]()
    for _ in range(len(units) - 1):
        nearest = alike.amax(1)
        nearest[order] = -2
        unit = int(nearest.argmax())
        order.append(unit)
        harms.append(1 - float(nearest[unit].clamp(0, 1)))
        alike[unit] = alike[:, unit] = -1
    mean = max(sum(harms) / max(1, len(harms)), 1e-30)
    return Ranking(order, [harm / mean for harm in harms])


def taylor(units: Removable, evidence: Evidence) -> Ranking:
    """Square of what the loss changes to first order without a unit, on labelled batches.

    Molchanov et al. 2019, arXiv:1906.10771, eq. 8; for heads, Michel et al. 2019,
    arXiv:1905.10650, eq. 2.
    """
    return Ranking.of(_pulls(units, evidence.gradients), shares=False)


def fisher(units: Removable, evidence: Evidence) -> Ranking:
    """What the divergence from the network's own answers changes to second order. No labels.

    Theis et al. 2018, arXiv:1801.05787, eq. 6; Liu et al. 2021, arXiv:2108.00708, eq. 6.
    """
    return Ranking.of(_pulls(units, evidence.scores) / 2, shares=False)


def random(units: Removable, evidence: Evidence) -> Ranking:
    """By lot: the control that every other must beat."""
    return Ranking.of(torch.rand(len(units), generator=evidence.generator), shares=False)


def reconstruction(units: Removable, evidence: Evidence) -> Ranking:
    """What is lost of the outputs of the weights that read a unit, once they are fitted anew.

    Optimal brain surgery on blocks of columns, exact for what a weight is given: removing block q
    costs W_q (M^-1_qq)^-1 W_q^T. Hassibi, Stork 1993, eq. 5; Kurtic et al. 2022, arXiv:2203.07259,
    eq. 6, for blocks. How much the network minds is measured, see `Evidence.harm`.
    """
    surgeries = [_Surgery.of(end, evidence) for end in units.readers]
    left, order, losses = list(range(len(units))), list[int](), list[float]()
    # A few at a time, where there are many: they hardly know of each other.
    few = max(1, len(units) // 128)
    while len(left) > few:
        costs = torch.stack([surgery.costs(left) for surgery in surgeries]).sum(0)
        least = costs.argsort(stable=True)[:few].tolist()
        gone = [left[place] for place in least]
        for surgery in surgeries:
            surgery.remove(gone)
        lost = sum(surgery.lost for surgery in surgeries)
        losses += [lost] * len(gone)
        order += gone
        left = [unit for unit in left if unit not in gone]
    return evidence.harm(units, order, losses)


CRITERIA: dict[str, Criterion] = {
    each.__name__: each
    for each in (
        reconstruction,
        fisher,
        taylor,
        l1,
        l2,
        group_norm,
        geometric_median,
        activation,
        apoz,
        similarity,
        random,
    )
}


class _Surgery:
    """A weight that loses columns, and the inverse moments of those that stay."""

    def __init__(self, matrix: Tensor, own: Tensor, lines: Tensor) -> None:
        """matrix: (groups, rows, inputs); own: (groups, inputs, inputs), damped"""
        self._matrix, self._lines = matrix.clone(), lines
        self._inverse = torch.linalg.inv(own)
        self._energy = float(((matrix @ own) * matrix).sum()) or 1.0
        self.lost = 0.0

    @classmethod
    def of(cls, end: End, evidence: Evidence) -> _Surgery:
        own = evidence.moments(end)
        matrix = rows(end.site.weight, end.site.axis).double()
        return cls(matrix.reshape(len(own), -1, matrix.shape[1]), own, end.lines)

    def costs(self, units: list[int]) -> Tensor:
        """Share of the outputs' energy that each of these would cost alone."""
        blocks = self._lines[units]
        found = self._matrix.new_zeros(len(units))
        for matrix, inverse in zip(self._matrix, self._inverse, strict=True):
            parts = matrix[:, blocks].movedim(1, 0)
            inner = inverse[blocks[:, :, None], blocks[:, None, :]]
            pulled = torch.linalg.solve(inner, parts.transpose(1, 2))
            found += (parts.transpose(1, 2) * pulled).sum((1, 2))
        return found / self._energy

    def remove(self, units: list[int]) -> None:
        """Takes these away; what stays makes up for them."""
        lines = self._lines[units].flatten()
        for matrix, inverse in zip(self._matrix, self._inverse, strict=True):
            inner, gone = inverse[lines][:, lines], matrix[:, lines]
            self.lost += float((gone.T * torch.linalg.solve(inner, gone.T)).sum()) / self._energy
            pulled = torch.linalg.solve(inner, inverse[lines])
            matrix -= gone @ pulled
            inverse -= inverse[:, lines] @ pulled
            matrix[:, lines] = 0
            inverse[lines] = inverse[:, lines] = 0
            # So that what is gone stays apart from what is left.
            inverse[lines, lines] = 1


def _lines(end: End, *, writes: bool) -> Tensor:
    """(units, values) of a weight that go with each unit."""
    matrix = rows(end.site.weight, end.site.axis).float()
    taken = matrix[end.lines] if writes else matrix[:, end.lines].movedim(1, 0)
    return taken.flatten(1)


def _written(units: Removable) -> Tensor:
    return torch.cat([_lines(end, writes=True) for end in units.writers], 1)


def _read(units: Removable, of: Callable[[End], Tensor | None]) -> Tensor:
    """(units,) means over the columns that read each, of weights whose inputs can be seen."""
    found = [(end, of(end)) for end in units.readers]
    means = [values[end.lines].mean(1) for end, values in found if values is not None]
    if not means:
        raise OptionError(
            f'what "{units.name}" gives is only read by layers whose inputs cannot be seen; use '
            'criterion="l2", or leave it out'
        )
    return torch.stack(means).mean(0)


def _products(end: End, evidence: Evidence) -> Tensor:
    """(units, units) of what they give, place by place."""
    own = evidence.moments(end).sum(0)
    return sum(own[column][:, column] for column in end.lines.T)  # type: ignore[return-value]


def _pulls(units: Removable, of: Callable[[End], Tensor]) -> Tensor:
    """(units,) mean square of what a gate on each would be pulled by.

    The gradient of a gate is the sum of weight times gradient over all columns that read the unit.
    """
    gates = torch.stack([of(end)[:, end.lines].sum(2) for end in units.readers]).sum(0)
    return gates.square().mean(0)
