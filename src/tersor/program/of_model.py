"""The stored forward pass of a model that may hold forms, checked against the model itself."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tersor.errors import ExportError
from tersor.program.interpreter import Interpreted
from tersor.program.program import Program
from tersor.program.trace import trace
from tersor.surgery.hold import decoded, held, release_all
from tersor.task import device_of

Example = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]

TOLERANCE = 1e-6
"""Largest difference, relative to the largest output, that a stored graph may show in float32."""


def program_of(model: nn.Module, example: Example) -> Program:
    """Traces the forward pass of `model` and checks it on the example. Raises ExportError."""
    args, kwargs = _on(device_of(model), call_arguments(example))
    dense = release_all(copy.deepcopy(model)) if next(held(model), None) else model
    program = trace(dense, args, kwargs)
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), decoded(model.eval()):
            expected = model(*_copied(args), **_copied(kwargs))
            found = Interpreted(program, dense)(*_copied(args), **_copied(kwargs))
    finally:
        for module, mode in training.items():
            module.training = mode
    _compare(expected, found, type(model).__name__)
    return program


def own_program(model: Interpreted) -> Program:
    """The program that `model` runs, with its constants and type as they are now."""
    stored = model._program_constants
    names = model.program.constant_names
    constants: dict[str, Tensor] = {n: getattr(stored, f"c{i}") for i, n in enumerate(names)}
    dtype = getattr(model, "_program_like").dtype  # noqa: B009 - not typed on nn.Module
    return dataclasses.replace(model.program, constants=constants, dtype=dtype)


def call_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call with one batch of inputs."""
    if isinstance(example, dict):
        return (), example
    if isinstance(example, tuple | list):
        pair = len(example) == 2 and isinstance(example[0], tuple | list)
        if pair and isinstance(example[1], dict):
            return tuple(example[0]), example[1]
        return tuple(example), {}
    return (example,), {}


def _on(device: torch.device, inputs: Any) -> Any:
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)


def _copied(inputs: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


def _compare(expected: Any, found: Any, name: str) -> None:
    for number, (x, y) in enumerate(_pairs(expected, found)):
        if x.shape != y.shape:
            gap, allowed = math.inf, 0.0
        elif not x.is_floating_point() or not x.numel():
            continue
        else:
            wanted = x.double().nan_to_num()
            gap = float((wanted - y.double().nan_to_num()).abs().max())
            finest = max(TOLERANCE, 8 * torch.finfo(x.dtype).eps)
            allowed = finest * float(wanted.abs().max())
        if gap > allowed:
            raise ExportError(
                f"the stored graph of {name} gives output {number} with an error of {gap:.3g}, "
                f"above {allowed:.3g}; store the weights alone with graph=False"
            )


def _pairs(expected: Any, found: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of two outputs in the same places; the stored graph may lack some of the model's."""
    if isinstance(found, Tensor):
        yield expected, found
    elif isinstance(found, Mapping):
        for key, part in found.items():
            other = expected[key] if isinstance(expected, Mapping) else getattr(expected, key)
            yield from _pairs(other, part)
    elif isinstance(found, list | tuple):
        for other, part in zip(expected, found, strict=True):
            yield from _pairs(other, part)
