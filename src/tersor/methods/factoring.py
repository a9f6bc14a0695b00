"""Factorizing: which layers may become chains, what that loses and saves, and putting chains in.

A technique says how to factorize one weight; ranks are chosen here, over all layers at once. What
a layer's error costs is told by the task's divergence where gradients pass, and else by how large
it is beside what the layer gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import ModelError, OptionError, TaskError
from tersor.forms.form import rows
from tersor.measure.curvature import Curvature, GradientError, curvature
from tersor.measure.running import evaluating
from tersor.methods.clock import Clock
from tersor.methods.ranks import Way, chosen
from tersor.recipe import Outcome
from tersor.surgery.chain import Chain, chain_for, replace, whole_because
from tersor.surgery.hold import bake
from tersor.surgery.links import Ranks, sizes_of, work
from tersor.surgery.structure import Structure, note
from tersor.surgery.walk import Patterns, Site, kind_of, walk
from tersor.task import Task

Keep = Annotated[float, Field(gt=0, lt=1)]
Of = Literal["bytes", "macs", "latency"]
Weigh = Literal["inputs", "fisher", "none"]
Samples = Annotated[int, Field(ge=1)]

_TRUST = 0.75
"""How much of a curvature is believed where layers are compared: it holds for small errors only."""


@dataclass
class Target:
    """A layer that may become a chain.

    path: of its first place
    matrix: (outputs, inputs) float64
    inputs: (inputs, inputs), second moments of what it is multiplied with; None for all alike
    answers: (outputs, outputs), how the divergence curves in what it gives, 1 on average; None for
        all alike
    price: of one unit of lost energy, in units that layers can be compared in; None for unknown
    calls: shapes of what it takes and gives for one sample
    """

    path: str
    site: Site
    layer: nn.Module
    matrix: Tensor
    inputs: Tensor | None = None
    answers: Tensor | None = None
    price: float | None = None
    calls: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


@dataclass(frozen=True)
class Candidates:
    """Ways to factorize one weight.

    energy: of the whole weight, in the measure of `lost`
    lost: by ranks, or an estimate of it
    links: for given ranks the weights of all links, and the share of energy that is lost
    """

    energy: float
    lost: Mapping[Ranks, float]
    links: Callable[[Ranks], tuple[Sequence[Tensor], float]]


def factorized(
    model: nn.Module,
    task: Task | None,
    technique: tuple[str, str],
    candidates: Callable[[Target], Candidates],
    *,
    keep: float,
    of: Of,
    weigh: Weigh,
    samples: int,
    sites: tuple[Patterns, Patterns],
) -> tuple[nn.Module, Outcome]:
    """Puts chains in the place of layers, in place; the outcome says which, and what is lost.

    technique: its name, and what its chains are made by
    candidates: ways to factorize a layer's weight
    sites: include, exclude; the rest as in `factorize.svd`
    """
    name, made_by = technique
    targets, left = _targets(name, made_by, model, walk(model, *sites))
    targets = _look(name, model, task, targets, left, (of, weigh, samples))
    found = {target.path: candidates(target) for target in targets}
    known = all(target.price is not None for target in targets)
    for target in targets:
        energy = found[target.path].energy
        relative = 1 / energy if energy > 0 else 0.0
        target.price = relative * ((target.price or 0.0) * energy) ** _TRUST if known else relative
    clock = Clock(of, made_by)
    ways = {t.path: _ways(t, made_by, found[t.path], clock) for t in targets}
    for path in [path for path, each in ways.items() if len(each) == 1]:
        left[path] = "its factors would not be smaller"
        del ways[path]
    if not ways:
        raise OptionError(_nothing(name, left))
    taken = chosen(ways, keep)
    layers: dict[str, Any] = {}
    for target in targets:
        way = taken.get(target.path)
        if way is not None and way.ranks:
            links, lost = found[target.path].links(way.ranks)
            _put(model, target, made_by, way.ranks, links)
            layers[target.path] = {"ranks": list(way.ranks), "lost": lost}
        elif way is not None:
            left[target.path] = "every rank would cost more than it saves"
    costs = sum(way.cost for way in taken.values()), sum(each[0].cost for each in ways.values())
    return model, {"remains": costs[0] / costs[1], "layers": layers, "whole": left}


def _targets(
    name: str, made_by: str, model: nn.Module, sites: Sequence[Site]
) -> tuple[list[Target], dict[str, str]]:
    """What can become a chain, and for all other weights the reason."""
    links = _parts(model, Chain)
    for site in sites:
        if site.form is not None:
            raise OptionError(
                f'"{site.name}" of shape {tuple(site.weight.shape)} is stored as {site.form.kind} '
                f'already; factorize first, or leave it out with exclude="{site.name}"'
            )
        if id(site.uses[0][0]) in links:
            raise OptionError(
                f'"{site.name}" of shape {tuple(site.weight.shape)} is part of a chain already; '
                f'start from the original, or leave it out with exclude="{site.name}"'
            )
    attention = _parts(model, nn.MultiheadAttention)
    found, left = [], {}
    for site in sites:
        layer, attribute = site.uses[0]
        path = site.name.removesuffix(f".{attribute}")
        if len(site.uses) > 1:
            left[path] = "its weight is used in several places"
        elif layer is model:
            left[path] = "it is the network itself; put it into an nn.Sequential"
        elif id(layer) in attention:
            left[path] = "attention reads its weight without calling it"
        elif attribute != "weight":
            left[path] = f"{kind_of(layer)} is no layer that others could take the place of"
        elif layer._forward_hooks or _hooked(layer):
            left[path] = "it has hooks, which a chain would not call"
        elif reason := whole_because(layer, made_by):
            left[path] = reason
        else:
            matrix = rows(site.weight, site.axis).double().cpu()
            found.append(Target(path, site, layer, matrix))
    if not found:
        raise OptionError(_nothing(name, left))
    return found, left


def _parts(model: nn.Module, kind: type[nn.Module]) -> set[int]:
    """Modules that are of a kind, or inside of one that is."""
    owners = [module for module in model.modules() if isinstance(module, kind)]
    return {id(part) for owner in owners for part in owner.modules()}


def _hooked(layer: nn.Module) -> bool:
    """By others than torch's old weight norm, which is computed out."""
    normed = any(name.endswith("_g") for name in layer._parameters)
    return bool(layer._forward_pre_hooks) and not normed


def _nothing(name: str, left: Mapping[str, str]) -> str:
    path, reason = next(iter(left.items()))
    more = f", and so on for {len(left)} weights" if len(left) > 1 else ""
    return f'{name} has nothing to factorize: "{path}": {reason}{more}; include other layers'


def _look(
    name: str,
    model: nn.Module,
    task: Task | None,
    targets: list[Target],
    left: dict[str, str],
    how: tuple[Of, Weigh, int],
) -> list[Target]:
    """Fills in what is known of layers; returns those that are called, as far as it is known."""
    of, weigh, samples = how
    if task is None:
        if of != "bytes":
            raise TaskError(f"{name} needs inputs to count {of} with; pass a task, or of='bytes'")
        return targets
    _watch_calls(model, task, targets)
    left |= {t.path: "it is not called on calibration inputs" for t in targets if not t.calls}
    targets = [target for target in targets if target.calls]
    if not targets:
        raise OptionError(_nothing(name, left))
    for target in targets:
        bake(target.layer, "weight")
    batches, sites = task.calibration(samples), [target.site for target in targets]
    try:
        curved = curvature(model, task, batches, sites)
    except GradientError:
        curved = curvature(model, task, batches, sites, draws=0)
    for target in targets:
        _fill(target, curved[target.site.name], weigh)
    return targets


def _watch_calls(model: nn.Module, task: Task, targets: Sequence[Target]) -> None:
    """Notes the shapes that each layer takes and gives for the first sample."""
    with ExitStack() as stack:
        for target in targets:

            def note(_: nn.Module, given: Any, gives: Tensor, *, to: Target = target) -> None:
                to.calls.append((tuple(given[0].shape), tuple(gives.shape)))

            stack.callback(target.layer.register_forward_hook(note).remove)
        stack.enter_context(evaluating(model))
        task.predict(model, task.calibration(1)[0])


def _fill(target: Target, curve: Curvature, weigh: Weigh) -> None:
    inputs, answers = curve.inputs, curve.outputs
    if weigh != "none" and inputs is not None:
        if not bool(inputs.isfinite().all()):
            raise ModelError(
                f'"{target.site.name}": the squares of what it is given on calibration inputs are '
                f'not finite; check the inputs, or leave it out with exclude="{target.site.name}"'
            )
        target.inputs = inputs.mean(0)
    if weigh == "fisher" and answers is not None and float(answers.diagonal(0, 1, 2).mean()) > 0:
        target.answers = answers[0] / answers[0].diagonal().mean()
    energy = 1.0 if target.inputs is None else float(target.inputs.diagonal().mean())
    if curve.own > 0 and energy > 0:
        # Half the curvature of one weight, in units of its layer's output.
        target.price = curve.own / energy / 2


def _ways(target: Target, made_by: str, each: Candidates, clock: Clock) -> list[Way]:
    """The whole layer, and every chain of fewer numbers that costs less."""
    given, gives = target.calls[0] if target.calls else _no_call(target)
    whole = target.matrix.numel()
    small = {
        ranks: lost
        for ranks, lost in each.lost.items()
        if sum(n for n, _ in work(target.layer, made_by, ranks, given, gives)) < whole
    }
    cost = clock.costs(target.layer, target.calls, list(small))
    price = target.price or 0.0
    ways = [Way((), cost(()), 0.0)]
    return ways + [
        Way(ranks, cost(ranks), price * max(lost, 0.0))
        for ranks, lost in small.items()
        if cost(ranks) < ways[0].cost
    ]


def _no_call(target: Target) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one place, where sizes alone are asked for."""
    outputs, inputs, *kernel = sizes_of(target.layer)
    ones = [1] * len(kernel)
    return (1, inputs, *ones), (1, outputs, *ones)


def _put(
    model: nn.Module, target: Target, made_by: str, ranks: Ranks, weights: Sequence[Tensor]
) -> None:
    chain = chain_for(target.layer, made_by, ranks)
    owners = [m for m in chain.modules() if m._parameters.get("weight") is not None]
    with torch.no_grad():
        for owner, weight in zip(owners, weights, strict=True):
            own = owner.get_parameter("weight")
            own.copy_(weight.reshape(own.shape))
    replace(model, target.layer, chain)
    note(model, Structure(chains={target.path: (made_by, ranks)}))
