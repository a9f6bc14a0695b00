"""The best values of the weights that a mask leaves.

Source: Mozaffari et al. 2025 (OPTIMA), arXiv:2512.13886, for solving row by row on the mask of any
pruning method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.methods.columns import Problem
from tersor.methods.moments import Metric

_AT_ONCE = 2**25
"""Elements of the systems that are solved together."""


def least_squares(problem: Problem) -> Tensor:
    """Q of the problem, (outputs, inputs), which is zero where it must be.

    With k the inputs that a row keeps, M the metric and t its target: M[k, k] q[k] = (M t)[k].
    """
    if problem.zeros is None:
        return problem.target
    keep, pulls = ~problem.zeros, problem.metric.times(problem.target.T).T
    found, counts = torch.zeros_like(pulls), keep.sum(1)
    # Rows that keep about as many go together, those that keep most first.
    order = counts.argsort(stable=True, descending=True)
    start, stop = 0, int((counts > 0).sum())
    while start < stop:
        most = int(counts[order[start]])
        few = order[start : min(stop, start + max(1, _AT_ONCE // most**2))]
        found[few] = _solved(problem.metric, pulls[few], keep[few], most)
        start += len(few)
    return found


def _solved(metric: Metric, pulls: Tensor, keep: Tensor, most: int) -> Tensor:
    """The same for rows that keep `most` inputs at most."""
    places = keep.to(torch.uint8).sort(dim=1, stable=True, descending=True).indices[:, :most]
    real = keep.gather(1, places)
    system = metric.own[places[:, :, None], places[:, None, :]]
    # Where a row keeps fewer, it solves q = 0 for the rest.
    system.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0)
    system.diagonal(dim1=1, dim2=2).add_(torch.where(real, metric.extra, 1.0))
    wanted = pulls.gather(1, places).masked_fill(~real, 0)
    values = torch.cholesky_solve(wanted[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
    return torch.zeros_like(pulls).scatter_(1, places, values)
