"""The call to be traced, with its inputs and outputs reduced to flat lists of tensors."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import ExportError
from tersor.program.program import Fixed, Named, Ref, Slot


class Untraceable(Exception):
    """A model that cannot become a program, however its sizes are treated."""


class Call(nn.Module):
    """A model called with the structure of some example inputs, on tensors alone.

    inputs: name of each argument -> tree of `Slot` and `Fixed`
    keywords: names of the last arguments, those that are not given by position
    outputs: tree of the last outputs, its leaves `Ref`s into the returned list
    omitted: outputs that were left out, as sentences
    """

    def __init__(
        self, model: nn.Module, inputs: Mapping[str, Any], keywords: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = dict(inputs)
        self._keywords = list(keywords)
        self._positional = len(self.inputs) - len(self._keywords)
        self.outputs: Any = None
        self.omitted: list[str] = []

    def forward(self, *tensors: Tensor) -> list[Any]:
        """The outputs of the model as a flat list of tensors and numbers."""
        given = iter(tensors)
        values = [_rebuilt(tree, given) for tree in self.inputs.values()]
        named = dict(zip(self._keywords, values[self._positional :], strict=True))
        found: list[Any] = []
        self.omitted = []
        returned = self.model(*values[: self._positional], **named)
        self.outputs = self._output_tree(returned, "output", found)
        return found

    def _output_tree(self, value: Any, name: str, found: list[Any]) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        # A number may depend on the sizes of the inputs.
        if isinstance(value, Tensor | int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            found.append(value)
            return Ref(len(found) - 1)
        fields = _fields(value)
        if fields is not None:
            return self._named(fields, name, found, record=type(value) is not dict)
        if type(value) in (tuple, list):
            return type(value)(
                self._output_tree(part, f"{name}[{i}]", found) for i, part in enumerate(value)
            )
        raise Untraceable(
            f"{name} is a {type(value).__name__}, not a tensor, number or container of these"
        )

    def _named(
        self, fields: Mapping[Any, Any], name: str, found: list[Any], *, record: bool
    ) -> Named:
        branches = {}
        for key, part in fields.items():
            if not isinstance(key, str):
                raise Untraceable(f"{name} is a dict with the key {key!r}; keys must be text")
            count = len(found)
            try:
                branches[key] = self._output_tree(part, key, found)
            except Untraceable:
                # A cache of past steps, say, is of no use without the code that reads it.
                del found[count:]
                self.omitted.append(
                    f'output "{key}" is left out: a {type(part).__name__} cannot be stored'
                )
        return Named(branches, record=record)


def call_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Call, list[Tensor]]:
    """The call `model(*args, **kwargs)`, and its tensors in the order of the slots."""
    names, args, kwargs = _bound(model, args, kwargs)
    tensors: list[Tensor] = []
    values = zip(names, (*args, *kwargs.values()), strict=True)
    inputs = {name: _input_tree(value, name, tensors) for name, value in values}
    return Call(model, inputs, list(kwargs)), tensors


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """Named parts of a dict, dataclass or named tuple."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return None


def _input_tree(value: Any, name: str, found: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        found.append(value)
        return Slot(tuple(value.shape), value.dtype)
    if value is None or isinstance(value, bool | int | float | str):
        return Fixed(value)
    if type(value) in (tuple, list):
        return type(value)(_input_tree(p, f"{name}[{i}]", found) for i, p in enumerate(value))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return Named({k: _input_tree(part, f"{name}[{k!r}]", found) for k, part in value.items()})
    raise ExportError(
        f'input "{name}" is a {type(value).__name__}; a stored graph takes tensors, numbers, text, '
        "None and tuples, lists or dicts of these"
    )


def _rebuilt(tree: Any, given: Iterator[Tensor]) -> Any:
    match tree:
        case Slot():
            return next(given)
        case Fixed():
            return tree.value
        case Named():
            return {name: _rebuilt(part, given) for name, part in tree.fields.items()}
    return type(tree)([_rebuilt(part, given) for part in tree])


def with_slots(tree: Any, supply: Iterator[Slot]) -> Any:
    """The tree of inputs with each slot replaced by the next of `supply`."""
    build: Callable[[Any], Any] = lambda part: with_slots(part, supply)  # noqa: E731
    match tree:
        case Slot():
            return next(supply)
        case Fixed():
            return tree
        case Named():
            return Named({name: build(part) for name, part in tree.fields.items()})
    return type(tree)([build(part) for part in tree])


def _bound(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[str], tuple[Any, ...], dict[str, Any]]:
    """Names of the arguments of a call, and the call with as many by position as possible."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ExportError(
            f"the example inputs do not fit {type(model).__name__}.forward: {error}"
        ) from None
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(len(value))]
        else:
            names += list(value) if kind is inspect.Parameter.VAR_KEYWORD else [name]
    return names, bound.args, dict(bound.kwargs)
