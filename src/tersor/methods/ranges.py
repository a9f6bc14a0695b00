"""Scales and zero points of weights: the range whose rounding errors matter least.

Source: Nagel et al. 2021, arXiv:2106.08295, section 3.2.2, for ranges by squared error; Dong et al.
2019 (HAWQ), arXiv:1905.03696, for weighing errors by the curvature's diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.forms.affine import split_groups
from tersor.methods.columns import Levels, Problem

_SHARES = torch.linspace(1.0, 0.3, 36)


def levels_of(
    matrix: Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    weights: Tensor | None = None,
) -> Levels:
    """Levels for (outputs, inputs): of 36 shares of the full range, the best for each group.

    weights: (inputs,) of squared errors; None for all alike
    """
    grouped = split_groups(matrix, group_size)
    importance = torch.ones_like(matrix[:1]) if weights is None else weights[None].to(matrix)
    importance = split_groups(importance, group_size)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric and bits > 1:
        low = -high
    best = torch.full(grouped.shape[:2], torch.inf, device=matrix.device)
    scale = torch.ones(grouped.shape[:2], dtype=matrix.dtype, device=matrix.device)
    zero = torch.zeros_like(scale)
    for share in _SHARES.tolist():
        tried = _symmetric(grouped, share, high) if symmetric else _shifted(grouped, share, low)
        codes = (grouped / tried[0][..., None] + tried[1][..., None]).round_().clamp_(low, high)
        apart = (codes - tried[1][..., None]).mul_(tried[0][..., None]).sub_(grouped)
        error = (apart.square_() * importance).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried[0], scale)
        zero = torch.where(better, tried[1], zero)
    return Levels(scale, zero, low, high, group_size)


def levels_for(problem: Problem, bits: int, group_size: int | None, symmetric: bool) -> Levels:
    """Levels for the target of a problem, errors weighed by the energy of each input."""
    return levels_of(
        problem.target,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        weights=problem.metric.energies,
    )


def _symmetric(grouped: Tensor, share: float, high: int) -> tuple[Tensor, Tensor]:
    scale = _stored(grouped.abs().amax(-1) * (share / max(high, 1)))
    return scale, torch.zeros_like(scale)


def _shifted(grouped: Tensor, share: float, low: int) -> tuple[Tensor, Tensor]:
    """Zero must be one of the levels, so that zeros stay zeros."""
    least, most = grouped.amin(-1).clamp(max=0) * share, grouped.amax(-1).clamp(min=0) * share
    high = -low - 1
    scale = _stored((most - least) / (high - low))
    return scale, (low - least / scale).round().clamp(low, high)


def _stored(scale: Tensor) -> Tensor:
    """As a form stores it."""
    narrow = scale.to(torch.bfloat16).clamp(min=torch.finfo(torch.bfloat16).tiny)
    return narrow.to(scale.dtype)
