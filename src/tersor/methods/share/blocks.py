"""Sub-vectors of a weight and the values they share: k-means by what errors do, then their codes.

Source: Stock et al. 2020, arXiv:1907.05686, eq. 2 to 5, for k-means in the metric of what a weight
is multiplied with; Tseng et al. 2024 (QuIP#), arXiv:2402.04396, for error feedback
from one block of columns to the next (block LDLQ).
Differs: each place in a row has the moments of its own inputs, and the values are fitted to all
codes together by least squares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tersor.methods.columns import Problem
from tersor.methods.moments import unit_lower

# Products of sub-vectors and values that are looked at together.
_AT_ONCE = 2**23
_ROUNDS, _STEPS = 40, 16


class Blocks:
    """Rows of a weight as sub-vectors, the last ones filled up, with codes of values (k, d).

    codes: (outputs, places) int64
    """

    def __init__(self, problem: Problem, length: int, importance: Tensor) -> None:
        """importance: (outputs,) of the rows' errors"""
        outputs, inputs = problem.target.shape
        places = -(-inputs // length)
        own, extra = problem.metric.own, problem.metric.extra
        # Whatever stands behind the end of a row counts next to nothing.
        moments = own.new_zeros(places * length, places * length)
        moments[:inputs, :inputs] = own
        moments.diagonal()[:inputs] += extra
        moments.diagonal()[inputs:] = 1e-6 * moments.diagonal()[:inputs].mean()
        self._moments, self.importance = moments, importance
        self.target = own.new_zeros(outputs, places * length)
        self.target[:, :inputs] = problem.target
        self.length, self.places = length, places
        self.codes = torch.zeros(outputs, places, dtype=torch.long, device=own.device)

    @property
    def vectors(self) -> Tensor:
        """(outputs, places, d)."""
        return self.target.reshape(len(self.target), self.places, self.length)

    @property
    def metrics(self) -> Tensor:
        """What the errors of each place cost alone, (places, d, d)."""
        square = self._moments.reshape(self.places, self.length, self.places, self.length)
        return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def dense(self, values: Tensor) -> Tensor:
        """The rows that the codes stand for."""
        return values[self.codes].reshape(self.target.shape)

    def feed_forward(self, values: Tensor) -> None:
        """Chooses the codes place after place, each making up for the errors before it."""
        # Errors (E U)_k of moments = U U^T, U upper triangular, are each made as small as can be.
        lower, pivots = unit_lower(self._moments.flip(0, 1).contiguous())
        upper = (lower * pivots.clamp(min=0).sqrt()).flip(0, 1)
        carried = torch.zeros_like(self.target)
        for place, own in enumerate(self._places()):
            within, later = upper[own, own], slice(own.stop, None)
            moved = torch.linalg.solve_triangular(within, carried[:, own], upper=True, left=False)
            self.codes[:, place] = nearest(self.target[:, own] + moved, values, within @ within.T)
            error = self.target[:, own] - values[self.codes[:, place]]
            carried[:, later] += error @ upper[own, later]

    def descend(self, values: Tensor) -> None:
        """Goes over the codes again, each becoming the best for all others as they are."""
        pull = self.pull(values)
        for place, own in enumerate(self._places()):
            metric = self._moments[own, own]
            before = values[self.codes[:, place]]
            wanted = before + torch.linalg.solve(metric, pull[:, own], left=False)
            self.codes[:, place] = nearest(wanted, values, metric)
            pull -= (values[self.codes[:, place]] - before) @ self._moments[own]

    def pull(self, values: Tensor) -> Tensor:
        """What a small change of each weight would gain, (outputs, inputs)."""
        return (self.target - self.dense(values)) @ self._moments

    def bent(self, change: Tensor) -> Tensor:
        """How much a change (k, d) of the values takes from what a change of each would gain."""
        return self.by_value(self.dense(change) @ self._moments, len(change))

    def by_value(self, pulls: Tensor, count: int) -> Tensor:
        """(k, d) sums over the sub-vectors of each value. pulls: (outputs, inputs)"""
        weighed = (pulls * self.importance[:, None]).double().reshape(-1, self.length)
        sums = weighed.new_zeros(count, self.length)
        return sums.index_add_(0, self.codes.flatten(), weighed)

    def _places(self) -> Iterator[slice]:
        for start in range(0, self.places * self.length, self.length):
            yield slice(start, start + self.length)


def nearest(vectors: Tensor, values: Tensor, metric: Tensor) -> Tensor:
    """(n,) indices of the values (k, d) with the least (v - c) metric (v - c); the first on a tie.

    vectors: (n, d); metric: (d, d)
    """
    bent = values @ metric
    cost = (bent * values).sum(1)
    parts = (vectors).split_with_sizes(_pieces(len(vectors), len(values)))
    return torch.cat([torch.addmm(cost, part, bent.T, alpha=-2).argmin(1) for part in parts])


def clustered(blocks: Sequence[Blocks], start: Tensor) -> Tensor:
    """k-means from values (k, d) on, over the sub-vectors of all rows; sets their codes.

    Each value becomes the one for which its sub-vectors cost least. A value that none takes moves
    to the sub-vector that is worst off.
    """
    values, before = start, None
    for _ in range(_ROUNDS):
        worst = [_assigned(each, values) for each in blocks]
        codes = torch.cat([each.codes.flatten() for each in blocks])
        if before is not None and torch.equal(before, codes):
            break
        before = codes
        values = _means(blocks, values)
        idle = (codes.bincount(minlength=len(values)) == 0).nonzero()[:, 0]
        if len(idle):
            vectors = torch.cat([each.vectors.flatten(0, 1) for each in blocks])
            order = torch.cat(worst).argsort(descending=True, stable=True)[: len(idle)]
            values[idle] = vectors[order]
    return values


def _assigned(blocks: Blocks, values: Tensor) -> Tensor:
    """Gives each sub-vector the nearest value; returns what each then costs, flat."""
    costs = []
    for place, (vectors, metric) in enumerate(
        zip(blocks.vectors.unbind(1), blocks.metrics, strict=True)
    ):
        blocks.codes[:, place] = nearest(vectors, values, metric)
        error = vectors - values[blocks.codes[:, place]]
        costs.append(((error @ metric) * error).sum(1) * blocks.importance)
    return torch.stack(costs, 1).flatten()


def _means(blocks: Sequence[Blocks], values: Tensor) -> Tensor:
    """The best value of each cluster: sum of metrics times c = sum of metrics times vectors."""
    count, length = values.shape
    system = values.new_zeros(count, length, length, dtype=torch.float64)
    wanted = values.new_zeros(count, length, dtype=torch.float64)
    for each in blocks:
        metrics = each.metrics.double()
        flat = torch.arange(each.places, device=values.device) * count + each.codes
        shares = system.new_zeros(each.places * count).index_add_(
            0, flat.flatten(), each.importance.double()[:, None].expand_as(flat).flatten()
        )
        system += (shares.reshape(-1, count).T @ metrics.flatten(1)).reshape(system.shape)
        pulled = torch.einsum("opd,pde->ope", each.vectors.double(), metrics)
        wanted += each.by_value(pulled.flatten(1), count)
    used = system.diagonal(dim1=1, dim2=2).sum(1) > 0
    eye = torch.eye(length, dtype=torch.float64, device=values.device)
    system = torch.where(used[:, None, None], system, eye)
    found = torch.linalg.solve(system, wanted).to(values.dtype)
    return torch.where(used[:, None], found, values)


def fitted(blocks: Sequence[Blocks], values: Tensor) -> Tensor:
    """The values that suit the codes of all rows best, from those they have; unused ones stay."""
    found, count = values.double(), len(values)
    left = sum((each.by_value(each.pull(values), count) for each in blocks), found * 0)
    along, energy = left, float(left.square().sum())
    for _ in range(_STEPS):
        change = along.to(values.dtype)
        bent = sum((each.bent(change) for each in blocks), found * 0)
        curve = float((along * bent).sum())
        if not curve > 0 or not energy > 0:
            break
        found, left = found + energy / curve * along, left - energy / curve * bent
        before, energy = energy, float(left.square().sum())
        along = left + energy / before * along
    return found.to(values.dtype)


def _pieces(rows: int, columns: int) -> list[int]:
    size = max(1, _AT_ONCE // columns)
    return [min(size, rows - start) for start in range(0, rows, size)]
