"""The layers that chains may take the place of, and what is known of them.

What a layer's error costs is told by the task's divergence where gradients pass, and else by how
large it is beside what the layer gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from tersor.errors import ModelError, OptionError, TaskError
from tersor.forms.form import rows
from tersor.measure.curvature import Curvature, GradientError, curvature
from tersor.measure.running import evaluating
from tersor.methods.clock import Of
from tersor.surgery.chain import Chain, whole_because
from tersor.surgery.hold import bake
from tersor.surgery.walk import Site, kind_of
from tersor.task import Task

Weigh = Literal["inputs", "fisher", "none"]


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


def targets_of(
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
        raise OptionError(nothing(name, left))
    return found, left


def _parts(model: nn.Module, kind: type[nn.Module]) -> set[int]:
    """Modules that are of a kind, or inside of one that is."""
    owners = [module for module in model.modules() if isinstance(module, kind)]
    return {id(part) for owner in owners for part in owner.modules()}


def _hooked(layer: nn.Module) -> bool:
    """By others than torch's old weight norm, which is computed out."""
    normed = any(name.endswith("_g") for name in layer._parameters)
    return bool(layer._forward_pre_hooks) and not normed


def nothing(name: str, left: Mapping[str, str]) -> str:
    """What to say where all layers stay whole. left: the reason of each"""
    path, reason = next(iter(left.items()))
    more = f", and so on for {len(left)} weights" if len(left) > 1 else ""
    return f'{name} has nothing to factorize: "{path}": {reason}{more}; include other layers'


def look(
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
        raise OptionError(nothing(name, left))
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
