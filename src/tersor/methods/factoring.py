"""Factorizing: ranks are chosen over all layers at once, and chains put in the place of layers.

A technique says how to factorize one weight, and what that loses. With data, and where it follows
what inputs are like, each layer is then factorized for what those before it really give, with the
outputs of the original network as the target.

Source: Li et al. 2025 (GPTAQ), arXiv:2504.02692, eq. 5, for that target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import Dense
from tersor.forms.form import Form
from tersor.methods.clock import Clock, Of
from tersor.methods.columns import Problem
from tersor.methods.layerwise import Layer, layerwise
from tersor.methods.ranks import Way, chosen
from tersor.methods.targets import Target, Weigh, look, nothing, targets_of
from tersor.recipe import Outcome
from tersor.surgery import chain as chains
from tersor.surgery.links import Ranks
from tersor.surgery.structure import Structure, note
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task

Keep = Annotated[float, Field(gt=0, lt=1)]
Samples = Annotated[int, Field(ge=1)]

_TRUST = 0.75
"""How much of a curvature is believed where layers are compared: it holds for small errors only."""


@dataclass(frozen=True)
class Candidates:
    """Ways to factorize one weight.

    energy: of the whole weight, in the measure of `lost`
    lost: by ranks, or an estimate of it
    """

    energy: float
    lost: Mapping[Ranks, float]


@dataclass(frozen=True)
class Technique:
    """How weights are factorized.

    made_by: what its chains are made by
    candidates: of one weight
    links: for given ranks the weights of all links, and the share of energy that is lost
    follows: whether links are again fitted to what layers before them give
    """

    name: str
    made_by: str
    candidates: Callable[[Target], Candidates]
    links: Callable[[Target, Ranks], tuple[Sequence[Tensor], float]]
    follows: bool = False


def factorized(
    model: nn.Module,
    task: Task | None,
    technique: Technique,
    *,
    keep: float,
    of: Of,
    weigh: Weigh,
    samples: int,
    sites: tuple[Patterns, Patterns],
) -> tuple[nn.Module, Outcome]:
    """Puts chains in the place of layers, in place; the outcome says which, and what is lost.

    sites: include, exclude; the rest as in `factorize.svd`
    """
    name, made_by = technique.name, technique.made_by
    targets, left = targets_of(name, made_by, model, walk(model, *sites))
    targets = look(name, model, task, targets, left, (of, weigh, samples))
    found = {target.path: technique.candidates(target) for target in targets}
    _set_prices(targets, found)
    clock = Clock(of, made_by)
    ways = {t.path: _ways(t, made_by, found[t.path], clock) for t in targets}
    for path in [path for path, each in ways.items() if len(each) == 1]:
        left[path] = "its factors would not be smaller"
        del ways[path]
    if not ways:
        raise OptionError(nothing(name, left))
    taken = chosen(ways, keep)
    small = [t for t in targets if t.path in taken and taken[t.path].ranks]
    left |= {
        path: "it is worth more than ranks of others" for path, w in taken.items() if not w.ranks
    }
    new = {t.path: chains.chain_for(t.layer, made_by, taken[t.path].ranks) for t in small}
    follow = task if technique.follows and weigh != "none" else None
    lost = _set_links(model, follow, technique, small, new, samples)
    for target in small:
        chains.replace(model, target.layer, new[target.path])
    note(model, Structure(chains={path: (made_by, each.ranks) for path, each in new.items()}))
    costs = sum(way.cost for way in taken.values()), sum(each[0].cost for each in ways.values())
    layers = {path: {"ranks": list(new[path].ranks), "lost": lost[path]} for path in new}
    return model, {"remains": costs[0] / costs[1], "layers": layers, "whole": left}


def _set_prices(targets: Sequence[Target], found: Mapping[str, Candidates]) -> None:
    """Of energies whose layers cannot all be compared by divergence, only the share counts."""
    known = all(target.price is not None for target in targets)
    for target in targets:
        energy = found[target.path].energy
        relative = 1 / energy if energy > 0 else 0.0
        target.price = relative * ((target.price or 0.0) * energy) ** _TRUST if known else relative


def _ways(target: Target, made_by: str, each: Candidates, clock: Clock) -> list[Way]:
    """The whole layer, and every chain of fewer numbers that costs less."""
    whole, calls = target.matrix.numel(), target.calls
    small = {
        ranks: lost
        for ranks, lost in each.lost.items()
        if clock.numbers(target.layer, ranks) < whole
    }
    cost = clock.costs(target.layer, calls, list(small))
    price = target.price or 0.0
    ways = [Way((), cost(()), 0.0)]
    return ways + [
        Way(ranks, cost(ranks), price * max(lost, 0.0))
        for ranks, lost in small.items()
        if cost(ranks) < ways[0].cost
    ]


def _set_links(
    model: nn.Module,
    task: Task | None,
    technique: Technique,
    targets: Sequence[Target],
    new: Mapping[str, chains.Chain],
    samples: int,
) -> dict[str, float]:
    """Sets the weights of all chains; returns what share of energy each loses.

    task: whose inputs they follow, None for the network as it was
    """
    named = {target.site.name: target for target in targets}
    lost: dict[str, float] = {}

    def quantize(layer: Layer) -> Form:
        target = named[layer.site.name]
        if layer.moments is not None:
            own, cross = layer.moments.own[0], layer.moments.cross
            wanted = Problem.of(layer.matrix, own, None if cross is None else cross[0]).target
            target = replace(target, matrix=wanted.double().cpu(), inputs=own.double().cpu())
        chain = new[target.path]
        links, lost[target.path] = technique.links(target, chain.ranks)
        fill(chain, links)
        weight = chain.weight.detach()
        return Dense(weight, weight.dtype)

    if task is not None:
        layerwise(model, task, [t.site for t in targets], quantize, samples=samples, original=True)
        return lost
    for target in targets:
        links, lost[target.path] = technique.links(target, new[target.path].ranks)
        fill(new[target.path], links)
    return lost


def fill(chain: chains.Chain, links: Sequence[Tensor]) -> None:
    """Sets the weights of links, given in any shape."""
    owners = [m for m in chain.modules() if m._parameters.get("weight") is not None]
    with torch.no_grad():
        for owner, weight in zip(owners, links, strict=True):
            own = owner.get_parameter("weight")
            own.copy_(weight.reshape(own.shape))
