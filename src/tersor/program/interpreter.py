"""Runs a stored program as an `nn.Module`, with the weights where the original model had them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import FileError, ModelError
from tersor.program.inputs import Arguments
from tersor.program.operators import CONSTANT, WEIGHT, resolve
from tersor.program.program import Fixed, Model, Named, Node, Program, Ref, split_name
from tersor.program.skeleton import Container, Record


class Interpreted(Container):
    """A network rebuilt from a stored program: call it like the original.

    It always computes as in evaluation mode: batch norm uses the stored statistics and dropout is
    gone, also after `.train()`; gradients flow to the weights.
    """

    def __init__(
        self, program: Program, tree: nn.Module, constants: Mapping[str, Tensor] | None = None
    ) -> None:
        """Takes over the children and tensors of `tree`, a `skeleton` or any other module.

        Weights of the root itself that are to be held by forms must be held afterwards.
        """
        super().__init__(str(getattr(tree, "kind", type(tree).__name__)))
        self.__class__ = _signed(_signature(program))
        constants = program.constants if constants is None else constants
        self.program = program
        for name, child in tree.named_children():
            self.add_module(name, child)
        for name, parameter in tree.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in tree.named_buffers(recurse=False):
            persistent = name not in tree._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        self._program_constants = Container("constants")
        for index, name in enumerate(program.constant_names):
            if name not in constants:
                raise FileError(f'the stored program needs the constant "{name}", which is missing')
            self._program_constants.register_buffer(f"c{index}", constants[name], persistent=False)
        # Moves with .to(device or dtype), so the program can ask where and in what it runs.
        like = next((p for p in self.parameters()), torch.empty(0)).device
        self.register_buffer(
            "_program_like", torch.empty(0, dtype=program.dtype, device=like), persistent=False
        )
        self._bind()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the network, arranged as the original arranged them."""
        values: list[Any] = self._arguments.flatten(args, kwargs)
        values += self._padding
        values[-2], values[-1] = self._program_like.device, self._program_like.dtype
        for at, run, arguments, slots, nested, keywords, dead in self._steps:
            given = list(arguments)
            for place, index in slots:
                given[place] = values[index]
            for place, part in nested:
                given[place] = _filled(part, values)
            if keywords:
                named = {name: _filled(part, values) for name, part in keywords.items()}
                values[at] = run(*given, **named)
            else:
                values[at] = run(*given)
            for index in dead:
                values[index] = None
        return _arranged(self.program.output, values)

    def _get_name(self) -> str:
        return "Interpreted"

    def extra_repr(self) -> str:
        """Inputs and number of operators, for printing."""
        return f"inputs={list(self.program.inputs)}, operators={len(self.program.nodes)}"

    def _bind(self) -> None:
        """Resolves operators and the modules that own weights, once."""
        program = self.program
        self._arguments = Arguments(program)
        first = self._arguments.count
        self._padding = [None] * (len(program.nodes) + 2)
        end = first + len(program.nodes)
        markers = {Model.DEVICE: Ref(end), Model.DTYPE: Ref(end + 1)}
        last = _last_uses(program, first)
        self._steps = [
            self._step(node, at, markers, tuple(last.get(at, ())))
            for at, node in enumerate(program.nodes, first)
        ]

    def _step(
        self, node: Node, at: int, markers: Mapping[Model, Ref], dead: tuple[int, ...]
    ) -> tuple[Any, ...]:
        if node.operator == WEIGHT:
            holder, leaf = self._holder(self.program.weights[node.arguments[0]])
            return at, getattr, (holder, leaf), (), (), {}, dead
        if node.operator == CONSTANT:
            place = (self._program_constants, f"c{node.arguments[0]}")
            return at, getattr, place, (), (), {}, dead
        arguments = [_marked(argument, markers) for argument in node.arguments]
        slots = tuple((i, a.index) for i, a in enumerate(arguments) if isinstance(a, Ref))
        nested = tuple(
            (i, a) for i, a in enumerate(arguments) if isinstance(a, list) and _has_ref(a)
        )
        keywords = {name: _marked(value, markers) for name, value in node.keywords.items()}
        return at, resolve(node.operator), tuple(arguments), slots, nested, keywords, dead

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        path, leaf = split_name(name)
        holder: nn.Module = self
        for part in path.split(".") if path else ():
            child = holder._modules.get(part)
            if child is None:
                raise ModelError(f'the program uses the weight "{name}", but there is no "{path}"')
            holder = child
        held = isinstance(getattr(type(holder), leaf, None), property)
        if not (held or leaf in holder._parameters or leaf in holder._buffers):
            raise ModelError(f'the program uses the weight "{name}", which the model does not have')
        return holder, leaf

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (_signature(self.program),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        hidden = {"_steps", "_arguments", "_padding"}
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._bind()


_Signature = tuple[tuple[str, bool, Any], ...]


def _signature(program: Program) -> _Signature:
    """Name, whether it may be left out, and default of each input; () if Python cannot say it."""
    trees = program.inputs.items()
    if any(name == "self" or not name.isidentifier() or iskeyword(name) for name, _ in trees):
        return ()
    return tuple(
        (name, isinstance(tree, Fixed), getattr(tree, "value", None)) for name, tree in trees
    )


@cache
def _signed(signature: _Signature) -> type[Interpreted]:
    """An `Interpreted` whose forward shows the original's input names, for exporters and `help`."""
    if not signature:
        return Interpreted

    def forward(self: Interpreted, *args: Any, **kwargs: Any) -> Any:
        return Interpreted.forward(self, *args, **kwargs)

    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    parameters = [inspect.Parameter("self", kind)]
    for name, optional, value in signature:
        # Python wants a default on everything after an input that may be left out.
        needed = not optional and parameters[-1].default is empty
        parameters.append(inspect.Parameter(name, kind, default=empty if needed else value))
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("Interpreted", (Interpreted,), {"forward": forward, "__doc__": Interpreted.__doc__})


def _revive(signature: _Signature) -> Interpreted:
    kind = _signed(signature)
    return kind.__new__(kind)


def _marked(value: Any, markers: Mapping[Model, Ref]) -> Any:
    if isinstance(value, list | tuple):
        return [_marked(part, markers) for part in value]
    return markers[value] if isinstance(value, Model) else value


def _has_ref(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_ref(part) for part in value)
    return isinstance(value, Ref)


def _filled(value: Any, values: list[Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.index]
    return [_filled(part, values) for part in value] if isinstance(value, list) else value


def _arranged(tree: Any, values: list[Any]) -> Any:
    match tree:
        case Ref():
            return values[tree.index]
        case Named():
            fields = {name: _arranged(part, values) for name, part in tree.fields.items()}
            return Record(fields) if tree.record else fields
        case list() | tuple():
            return type(tree)(_arranged(part, values) for part in tree)
    return tree


def _references(tree: Any) -> list[int]:
    if isinstance(tree, Ref):
        return [tree.index]
    parts = tree.fields.values() if isinstance(tree, Named) else tree
    nested = isinstance(tree, Named | list | tuple)
    return [index for part in parts for index in _references(part)] if nested else []


def _last_uses(program: Program, first: int) -> dict[int, list[int]]:
    """Number of a node -> the values that nothing needs after it, so memory is given back early."""
    last: dict[int, int] = {}
    for at, node in enumerate(program.nodes, first):
        last[at] = at
        for index in _references([*node.arguments, *node.keywords.values()]):
            last[index] = at
    kept = set(_references(program.output))
    freed: dict[int, list[int]] = {}
    for index, at in last.items():
        if index not in kept:
            freed.setdefault(at, []).append(index)
    return freed
