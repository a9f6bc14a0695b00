"""Sensitivity: how far the outputs move when one weight alone is stored another way.

The measure is the task's divergence from the untouched model on unlabelled calibration inputs,
which is smooth where accuracy is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.forms.form import Form
from tersor.measure.figures import Figures
from tersor.measure.rerun import Rerun
from tersor.measure.running import Inputs, check_outputs, evaluating, unfused
from tersor.surgery.hold import decoded
from tersor.surgery.walk import Site, walk

if TYPE_CHECKING:
    from tersor.task import Task


@dataclass(frozen=True)
class Sensitivity(Figures):
    """One way to store one weight.

    site: name of the weight, "layer1.0.conv1.weight"
    option: name of the way
    divergence: mean over the calibration rows; infinite where an output is no longer finite
    bytes: what the weight takes then
    """

    site: str
    option: str
    divergence: float
    bytes: int


def reference_outputs(model: nn.Module, task: Task, inputs: Sequence[Inputs]) -> list[Tensor]:
    """The model's outputs on each batch, to measure divergence from. Raises ModelError for NaN."""
    if not inputs:
        raise TaskError("there are no calibration inputs; give the task at least one batch")
    with evaluating(model), unfused():
        return [
            check_outputs(task.predict(model, batch), model, f"calibration batch {number}")
            for number, batch in enumerate(inputs, 1)
        ]


def divergence_of(
    model: nn.Module, task: Task, inputs: Sequence[Inputs], reference: Sequence[Tensor]
) -> float:
    """Mean divergence of the model's outputs from `reference`; infinite if one is not a number."""
    with evaluating(model), unfused():
        return _mean(
            task.divergence(given, task.predict(model, batch))
            for batch, given in zip(inputs, reference, strict=True)
        )


def sensitivity(
    model: nn.Module,
    task: Task,
    options: Mapping[str, Callable[[Site], Form]],
    *,
    sites: Sequence[Site] | None = None,
    inputs: Sequence[Inputs] | None = None,
    size_of: Callable[[Form], int] | None = None,
    on_result: Callable[[Sensitivity], None] | None = None,
) -> list[Sensitivity]:
    """Measures every option for every weight, each alone; the model is left exactly as it was.

    options: name -> what makes the form of a site's weight
    sites: weights to try, None for all of `walk(model)`
    inputs: calibration batches, None for the task's
    size_of: bytes of a form, None for its stored bits / 8
    on_result: called after each measurement, for progress and journals
    """
    if not options:
        raise OptionError('options={} has nothing to try; give for example {"int4": make_form}')
    batches = list(task.calibration() if inputs is None else inputs)
    results = []
    with probing(model, task, batches) as divergence:
        for site in walk(model) if sites is None else sites:
            for name, make in options.items():
                form = make(site)
                size = -(-form.stored_bits() // 8) if size_of is None else size_of(form)
                results.append(Sensitivity(site.name, name, divergence(site, form), size))
                if on_result is not None:
                    on_result(results[-1])
    return results


@contextmanager
def probing(
    model: nn.Module, task: Task, inputs: Sequence[Inputs]
) -> Iterator[Callable[[Site, Form], float]]:
    """Yields `divergence(site, form)`: how far the outputs move when `form` holds that weight.

    The same figures as `swapped` and `divergence_of` give, at about half the cost: what comes
    before the weight is not computed again. Quickest when all forms of a site are tried in a row.
    The model must stay as it is inside the block.
    """
    if not inputs:
        raise TaskError("there are no calibration inputs; give the task at least one batch")
    with evaluating(model), unfused():
        passes = [Rerun(partial(task.predict, model, batch)) for batch in inputs]
        for number, each in enumerate(passes, 1):
            check_outputs(each.reference, model, f"calibration batch {number}")

        def divergence(site: Site, form: Form) -> float:
            weight = _stored(site)
            for each in passes:
                each.prepare(weight)
            with swapped(site, form), decoded(model):
                return _mean(task.divergence(each.reference, each()) for each in passes)

        yield divergence


def _stored(site: Site) -> Tensor | None:
    """The tensor that the layers read; None where they compute it, from a parametrization say."""
    layer, attribute = site.uses[0]
    if site.form is not None:
        return site.form.value()
    tensor = layer._parameters.get(attribute)
    return layer._buffers.get(attribute) if tensor is None else tensor


@contextmanager
def swapped(site: Site, form: Form) -> Iterator[None]:
    """Inside the block `form` holds the weight of `site`; after it all is exactly as before."""
    # With children, since a parametrization lives in one.
    layers = {id(part): part for layer, _ in site.uses for part in layer.modules()}.values()
    states = [(layer, type(layer), _contents(layer)) for layer in layers]
    # Removing a parametrization writes the computed weight over the parameter it came from.
    originals = [
        (p, p.data) for layer in layers for p in layer._parameters.values() if p is not None
    ]
    try:
        site.hold(form)
        yield
    finally:
        for layer, kind, contents in states:
            layer.__class__ = kind
            _restore(layer, contents)
        for parameter, data in originals:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data


def _contents(layer: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The layer's attributes; its tables of parameters, children and hooks with a copy."""
    return {
        key: (value, value.copy() if isinstance(value, dict) else None)
        for key, value in layer.__dict__.items()
    }


def _restore(layer: nn.Module, contents: dict[str, tuple[Any, Any]]) -> None:
    for value, copy in contents.values():
        if copy is not None:
            value.clear()
            value.update(copy)
    layer.__dict__.clear()
    layer.__dict__.update({key: value for key, (value, _) in contents.items()})


def _mean(parts: Iterator[Tensor]) -> float:
    total, count = 0.0, 0
    for rows in parts:
        total += rows.double().sum().item()
        count += rows.numel()
    mean = total / max(1, count)
    return mean if math.isfinite(mean) else math.inf
