"""Moving factors of channels from one layer to another without changing what a network computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersor.errors import ModelError
from tersor.measure import reference_outputs
from tersor.measure.running import whole_floats
from tersor.methods.placing import is_linear
from tersor.surgery.walk import kind_of
from tersor.task import Task

TOLERANCE = 1e-4
"""Largest change of an output, relative to the largest output, that rounding may explain."""


def movable(model: nn.Module, layers: Collection[nn.Module]) -> set[nn.Module]:
    """Those of the layers whose weight is a plain parameter of theirs alone."""
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        layer
        for layer in layers
        if isinstance(layer._parameters.get("weight"), Tensor)
        and all(places[id(p)] == 1 for p in layer._parameters.values() if p is not None)
        and not getattr(layer, "parametrizations", None)
    }


def is_norm(layer: nn.Module) -> bool:
    """Whether its output is a vector times `weight` plus `bias`, as layer norms' is."""
    weight = layer._parameters.get("weight")
    named = isinstance(layer, nn.LayerNorm | nn.RMSNorm) or kind_of(layer).endswith("RMSNorm")
    return named and weight is not None and weight.dim() == 1


def by_inputs(layer: nn.Module) -> Tensor:
    """The weight as (groups, outputs of a group, inputs of a group, kernel); a view."""
    weight = layer.get_parameter("weight").detach()
    if kind_of(layer) == "Conv1D":
        return weight.T.reshape(1, weight.shape[1], weight.shape[0], 1)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def by_outputs(layer: nn.Module) -> Tensor:
    """The weight as (outputs, rest); a view."""
    weight = layer.get_parameter("weight").detach()
    return weight.T if kind_of(layer) == "Conv1D" else weight.flatten(1)


def multiply_inputs(layer: nn.Module, factor: Tensor) -> None:
    """Multiplies the weights that meet each input by its factor, (inputs,)."""
    weight = by_inputs(layer)
    weight *= factor.reshape(weight.shape[0], 1, weight.shape[2], 1)


def multiply_outputs(layer: nn.Module, factor: Tensor) -> None:
    """Multiplies what a layer or norm gives in each channel by its factor, (outputs,)."""
    if is_norm(layer):
        layer.get_parameter("weight").detach().mul_(factor)
    else:
        by_outputs(layer).mul_(factor[:, None])
    bias = layer._parameters.get("bias")
    if bias is not None:
        bias.detach().mul_(factor)


def is_layer(layer: nn.Module) -> bool:
    """Whether a factor may be moved into or out of its weight."""
    transposed = isinstance(layer, _ConvNd) and layer.transposed
    return is_linear(layer) or (isinstance(layer, _ConvNd) and not transposed)


class Unchanged:
    """Checks that a network still answers as it did.

    example: what to run it on, a few samples
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        self._model, self._task = model, task
        self._inputs = [task.example(2)]
        with whole_floats():
            self._reference = reference_outputs(model, task, self._inputs)

    def error(self) -> float:
        """The largest change of an output, relative to the largest output."""
        with whole_floats():
            found = reference_outputs(self._model, self._task, self._inputs)
        pairs = zip(self._reference, found, strict=True)
        gaps = [(a - b).abs().max() / a.abs().max().clamp(min=1e-30) for a, b in pairs]
        return float(torch.stack(gaps).max())

    def check(self, method: str) -> float:
        """The error. Raises ModelError where it is more than rounding explains."""
        error = self.error()
        if not error <= TOLERANCE:
            raise ModelError(
                f"{method} has changed an output of {type(self._model).__name__} by {error:.2g} of "
                f"the largest, above {TOLERANCE:g}: the network does more with its layers than one "
                "run showed; leave layers out with exclude, or leave out this step"
            )
        return error
