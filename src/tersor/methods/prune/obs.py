"""Optimal Brain Surgeon: the weight that costs least goes, all others make up for it, and again.

Loses least of all that remove weights without training, at 50 % and above all beyond. Takes time
with the cube of a layer's inputs, and memory with their square: seconds for a ResNet-20; where
layers have thousands of inputs take `prune.sparsegpt`.

Source: Hassibi, Stork, Wolff 1993, "Optimal Brain Surgeon and general network pruning", eq. 5;
Frantar, Singh, Alistarh 2022 (OBC), arXiv:2208.11580, algorithms 1 and 2.
Differs from the papers: updates of the inverse are applied 32 at a time, and what stays is solved
for anew at the end, which is what the updates would come to without rounding. With scope="global"
the losses of a layer are scaled by what its pruning alone does to the network's outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.forms import Bitmask
from tersor.forms.form import unrows
from tersor.measure.sensitivity import probing
from tersor.methods.calibrated import problems
from tersor.methods.columns import Problem
from tersor.methods.layerwise import Layer, layers_of
from tersor.methods.masks import Pattern, Sparsity, Wanted, largest, prune_layers
from tersor.methods.moments import Metric, unit_lower
from tersor.methods.support import least_squares
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task

_AT_ONCE = 2**25
"""Elements of the inverses of rows that are dealt with together."""
_BLOCK = 32
"""Updates of the inverses that are applied together."""
_PROBED = 256
"""Calibration inputs on which each layer is pruned alone."""
_MOST = 1e9
"""Stands for an infinite divergence."""


@method
def obs(
    model: nn.Module,
    task: Task | None = None,
    *,
    sparsity: Sparsity = 0.5,
    scope: Literal["layer", "global"] = "layer",
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Sets the weights that cost least to zero and moves the others, in place.

    sparsity: fraction of the weights that become zero, above 0 and below 1; or a pattern such as
        "2:4", for 2 of every 4 neighbouring inputs that stay
    scope: "layer" removes the same fraction of each; "global" lets layers compete with each other,
        at twice the time. A pattern keeps as many of each in either case
    samples: calibration inputs to use, at most
    include, exclude: patterns on names and types, see `walk`

    Removes round(sparsity * n) of n weights, from those outputs that lose least by it; a layer with
    as many zeros already stays as it is. A pattern leaves layers alone whose inputs m does not
    divide; the step's outcome names them. Raises TaskError without data, OptionError for a layer
    that would lose all its weights or that is quantized already, ModelError for inputs of a layer
    that are not finite.
    """

    def shares(task: Task, sites: Sequence[Site], share: float) -> dict[str, float]:
        return _shares(model, task, sites, share, samples)

    outcome = prune_layers(
        "prune.obs",
        model,
        task,
        least_removed,
        sparsity=sparsity,
        samples=samples,
        sites=(include, exclude),
        shares=shares if scope == "global" else None,
    )
    return model, outcome


def least_removed(problem: Problem, goal: Wanted) -> Tensor:
    """The target without the weights that cost least, and the best values for all others."""
    order, losses = removals(problem, goal)
    return _without(problem, order, _counts(losses, goal))


def removals(problem: Problem, goal: Wanted) -> tuple[Tensor, Tensor]:
    """In which order each row loses its weights, and what each removal costs: (outputs, steps).

    Costs never fall along a row: one that costs less than those before it comes with them. A row
    can lose all its weights, or as many as a pattern asks for.
    """
    size = problem.target.shape[1]
    few = max(1, _AT_ONCE // size**2)
    inverse = _inverse(problem.metric)
    found = [_greedy(part, inverse, goal) for part in torch.split(problem.target, few)]
    order, losses = (torch.cat(parts) for parts in zip(*found, strict=True))
    return order, losses.cummax(1).values


def _greedy(target: Tensor, inverse: Tensor, goal: Wanted) -> tuple[Tensor, Tensor]:
    """OBC's algorithm 1 for some rows. inverse: of the moments H

    With u the column of the inverse at the input removed, divided by the root of its diagonal
    there, the inverse without that input is the inverse minus u u^T. A few u wait to be subtracted.
    """
    outputs, inputs = target.shape
    steps = inputs // goal.m * (goal.m - goal.n) if isinstance(goal, Pattern) else inputs
    every = torch.arange(outputs, device=target.device)
    weight, inverses = target.clone(), inverse.repeat(outputs, 1, 1)
    diagonal = inverse.diagonal().repeat(outputs, 1)
    shut = torch.zeros_like(target, dtype=torch.bool)
    gone = torch.zeros_like(shut)
    waiting = target.new_zeros(outputs, _BLOCK, inputs)
    order = torch.empty(outputs, steps, dtype=torch.long, device=target.device)
    losses = target.new_empty(outputs, steps)
    for step in range(steps):
        done = step % _BLOCK
        loss, at = (weight.square() / diagonal).masked_fill_(shut, torch.inf).min(1)
        order[:, step], losses[:, step] = at, loss
        column = inverses[every, at]
        column -= (waiting[every, :done, at][:, None] @ waiting[:, :done])[:, 0]
        pivot = column[every, at].clamp_(min=torch.finfo(column.dtype).tiny)[:, None]
        weight -= column * (weight[every, at][:, None] / pivot)
        waiting[:, done] = column / pivot.sqrt()
        diagonal -= waiting[:, done].square()
        gone[every, at] = True
        weight.masked_fill_(gone, 0)
        shut = _shut(gone, goal)
        if done == _BLOCK - 1:
            inverses.baddbmm_(waiting.transpose(1, 2), waiting, alpha=-1)
    return order, losses


def _shut(gone: Tensor, goal: Wanted) -> Tensor:
    """Inputs of each row that are not to be removed, because they are gone or their group is."""
    if not isinstance(goal, Pattern):
        return gone
    groups = gone.view(len(gone), -1, goal.m)
    full = groups.sum(2, keepdim=True) >= goal.m - goal.n
    return (groups | full).view(gone.shape)


def _inverse(metric: Metric) -> Tensor:
    moments = metric.own.clone()
    moments.diagonal().add_(metric.extra)
    lower, pivots = unit_lower(moments)
    return torch.cholesky_inverse(lower * pivots.sqrt())


def _counts(losses: Tensor, goal: Wanted) -> Tensor:
    """How many weights each row loses, (outputs,)."""
    if isinstance(goal, Pattern):
        return torch.full_like(losses[:, 0], losses.shape[1])
    return (~largest(losses.flatten(), goal)).view(losses.shape).sum(1)


def _without(problem: Problem, order: Tensor, counts: Tensor) -> Tensor:
    """The best weight without the first of `order` in each row."""
    places = torch.arange(order.shape[1], device=order.device)
    gone = places < counts[:, None]
    zeros = torch.zeros_like(problem.target, dtype=torch.bool).scatter_(1, order, gone)
    if problem.zeros is not None:
        zeros |= problem.zeros
    return least_squares(replace(problem, zeros=zeros))


def _shares(
    model: nn.Module, task: Task, sites: Sequence[Site], share: float, samples: int
) -> dict[str, float]:
    """What part of its weights each layer loses when all compete.

    A layer's losses are scaled so that they add up to the divergence that it causes alone, pruned
    by the same share as all.
    """
    twin = copy.deepcopy(model)
    named = {site.name: site for site in walk(twin)}
    layers = layers_of(twin, task, [named[site.name] for site in sites], samples=samples)
    losses = []
    with probing(twin, task, task.calibration(min(samples, _PROBED))) as divergence:
        for layer in layers:
            found, form, cost = _alone(layer, share)
            effect = min(divergence(layer.site, form), _MOST)
            losses.append(found.double() * (effect / cost if cost > 0 else 0.0))
    gone = torch.split(~largest(torch.cat(losses), share), [len(each) for each in losses])
    return {
        layer.site.name: int(each.sum()) / len(each)
        for layer, each in zip(layers, gone, strict=True)
    }


def _alone(layer: Layer, share: float) -> tuple[Tensor, Bitmask, float]:
    """Losses of all removals in a layer, what it is after a share of them, and what that costs."""
    losses, weights, cost = [], [], 0.0
    for part in problems(layer):
        order, found = removals(part, share)
        weight = _without(part, order, _counts(found, share))
        losses.append(found.flatten())
        weights.append(weight)
        cost += float(part.error(weight).sum())
    plain = layer.site.weight
    matrix = torch.cat(weights).to(plain.dtype)
    form = Bitmask.encode(unrows(matrix, tuple(plain.shape), layer.site.axis))
    return torch.cat(losses), form, cost
