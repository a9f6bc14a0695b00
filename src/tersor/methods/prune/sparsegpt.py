"""SparseGPT: weights become zero column after column, the columns to come making up for each.

The method for 50 % and for 2:4 where calibration data is at hand, about as quick as
`quantize.gptq`, whose equations it shares. Where a minute more is no matter `prune.obs` chooses
better, above all at higher sparsity. `recover.polish` sets what either leaves to its best.

Source: Frantar, Alistarh 2023 (SparseGPT), arXiv:2301.00774, algorithm 1, and its extension to n:m.
Differs from the paper: columns go in the order of falling energy, as in the code of GPTQ, groups of
n:m as a whole; factors are those of the moments and not of their inverse, which gives the same.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.methods.columns import Problem
from tersor.methods.masks import Pattern, Sparsity, Wanted, all_but, n_of_m, prune_layers
from tersor.methods.moments import Metric, unit_lower
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task

_BLOCK = 128


@method
def sparsegpt(
    model: nn.Module,
    task: Task | None = None,
    *,
    sparsity: Sparsity = 0.5,
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Sets the same fraction of each layer's weights to zero and moves the others, in place.

    sparsity: fraction of the weights that become zero, above 0 and below 1; or a pattern such as
        "2:4", for 2 of every 4 neighbouring inputs that stay
    samples: calibration inputs to use, at most
    include, exclude: patterns on names and types, see `walk`

    Removes round(sparsity * n) of a layer's n weights; a layer with as many zeros already stays as
    it is. A pattern leaves layers alone whose inputs m does not divide; the step's outcome names
    them. Raises TaskError without data, OptionError for a layer that would lose all its weights or
    that is quantized already, ModelError for inputs of a layer that are not finite.
    """
    outcome = prune_layers(
        "prune.sparsegpt",
        model,
        task,
        fed_forward,
        sparsity=sparsity,
        samples=samples,
        sites=(include, exclude),
    )
    return model, outcome


def fed_forward(problem: Problem, goal: Wanted) -> Tensor:
    """Zeros chosen some columns at a time, each column making up for those dealt with before it.

    The last of the order is dealt with first, see `unit_lower`.
    """
    order, lower, pivots = _ordered(problem.metric, goal)
    target = problem.target.T[order]
    zeros = torch.zeros_like(target, dtype=torch.bool)
    if problem.zeros is not None:
        zeros = problem.zeros.T[order]
    left, found = target.clone(), torch.empty_like(target)
    size = goal.m if isinstance(goal, Pattern) else _BLOCK
    for stop in range(len(target), 0, -size):
        start = max(0, stop - size)
        now = _best(target[start:stop], left[start:stop], lower[start:stop, start:stop])
        scores = now.square() * pivots[start:stop, None]
        scores.masked_fill_(zeros[start:stop], -torch.inf)
        if isinstance(goal, Pattern):
            keep = n_of_m(scores.T, goal).T
        else:
            count = round(goal * target[start:].numel()) - int(zeros[stop:].sum())
            keep = all_but(scores.flatten(), max(0, count)).view(scores.shape)
        zeros[start:stop] |= ~keep
        errors = torch.empty_like(left[start:stop])
        for at in reversed(range(start, stop)):
            found[at] = left[at].masked_fill(zeros[at], 0)
            errors[at - start] = target[at] - found[at]
            left[start:at].addr_(lower[at, start:at], errors[at - start])
        left[:start].addmm_(lower[start:stop, :start].T, errors)
    return found[order.argsort()].T


def _best(target: Tensor, left: Tensor, lower: Tensor) -> Tensor:
    """What the columns of a block would be if no more were removed.

    left: what each would be if those of the block dealt with before it were as in the target; they
        are not, so their differences are fed forward as well
    """
    owed: Tensor = torch.linalg.solve_triangular(
        lower.T, target - left, upper=True, unitriangular=True
    )
    return target - owed


def _ordered(metric: Metric, goal: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs by rising energy, those of a group as neighbours, with L and d of `unit_lower`."""
    if not isinstance(goal, Pattern):
        return metric.order, *metric.factors
    groups = metric.energies.view(-1, goal.m).sum(1).argsort(stable=True)
    order = (groups[:, None] * goal.m + torch.arange(goal.m, device=groups.device)).flatten()
    moments = metric.own[order[:, None], order]
    moments.diagonal().add_(metric.extra)
    return order, *unit_lower(moments)
