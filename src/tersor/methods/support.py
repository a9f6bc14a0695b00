"""The best values of the weights that a mask leaves.

Source: the normal equations of least squares; Zhang et al. 2025 (OPTIMA), arXiv:2512.13886, for
solving them row by row on the mask of any pruning method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.methods.moments import Metric

_AT_ONCE = 2**25
"""Elements of the systems that are solved together."""


def least_squares(metric: Metric, pulls: Tensor, keep: Tensor) -> Tensor:
    """W that is zero where `keep` is not, and costs least to a target T: see `Metric.of`.

    pulls: T M, (outputs, inputs)
    keep: (outputs, inputs) bool

    Each row solves M[k, k] w[k] = pulls[k] for the inputs k that it keeps.
    """
    found = torch.zeros_like(pulls)
    counts = keep.sum(1)
    # Rows that keep about as many go together.
    left = counts.argsort(stable=True)[int((counts == 0).sum()) :]
    while len(left):
        most = int(counts[left[-1]])
        few = max(1, _AT_ONCE // most**2)
        left, part = left[:-few], left[-few:]
        found[part] = _solved(metric, pulls[part], keep[part], most)
    return found


def _solved(metric: Metric, pulls: Tensor, keep: Tensor, most: int) -> Tensor:
    """The same for rows that keep `most` at most."""
    places = keep.to(torch.uint8).sort(dim=1, stable=True, descending=True).indices[:, :most]
    real = keep.gather(1, places)
    system = metric.own[places[:, :, None], places[:, None, :]]
    # Rows that keep fewer solve 1 * w = 0 for the rest.
    system.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0)
    system.diagonal(dim1=1, dim2=2).add_(torch.where(real, metric.extra, 1.0))
    lower = torch.linalg.cholesky(system)
    wanted = pulls.gather(1, places).masked_fill(~real, 0)
    values = torch.cholesky_solve(wanted[:, :, None], lower)[:, :, 0]
    return torch.zeros_like(pulls).scatter_(1, places, values)
