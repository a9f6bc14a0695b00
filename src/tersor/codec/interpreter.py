"""Runs a stored program as an `nn.Module`, with the weights where the original model had them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.codec.operators import CONSTANT, WEIGHT, resolve
from tersor.codec.program import Model, Named, Node, Program, Ref, split_name
from tersor.codec.program_inputs import Arguments
from tersor.errors import FileError, ModelError


class Container(nn.Module):
    """A module without a forward: it only holds tensors and other containers by name.

    kind: layer type of the original ("Conv2d"), or "" where it owned no tensors
    """

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind

    def __getitem__(self, index: int) -> nn.Module:
        child = self._modules.get(str(index))
        if child is None:
            raise IndexError(f"there is no child {index}; there are {list(self._modules)}")
        return child

    def _get_name(self) -> str:
        return self.kind or "Container"


class Record(OrderedDict[str, Any]):
    """Named outputs, read as `out["name"]`, `out.name` or by position as `out[0]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {list(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs in order, without their names."""
        return tuple(self.values())


def _flatten_record(record: Record) -> tuple[list[Any], list[str]]:
    return list(record.values()), list(record)


# Lets a model with named outputs be exported again.
torch.utils._pytree.register_pytree_node(
    Record,
    _flatten_record,
    lambda values, names: Record(zip(names, values, strict=True)),
    serialized_type_name="tersor.Record",
    flatten_with_keys_fn=lambda record: (
        [(torch.utils._pytree.MappingKey(name), value) for name, value in record.items()],
        list(record),
    ),
)


def skeleton(
    tensors: Mapping[str, Tensor | Sequence[int]],
    kinds: Mapping[str, str] | None = None,
    buffers: Collection[str] = (),
) -> Container:
    """Builds nested containers that hold `tensors` under their dotted names.

    tensors: name -> the tensor, or its shape for a placeholder on the meta device
    kinds: path of a module -> its layer type (`Program.kinds`)
    buffers: names that become buffers; integer tensors always do

    One tensor given under two names is shared by both.
    """
    kinds, root = kinds or {}, Container()
    shared: dict[int, nn.Parameter] = {}
    for path in kinds:
        _descend(root, path).kind = kinds[path]
    for name, given in tensors.items():
        path, leaf = split_name(name)
        tensor = given if isinstance(given, Tensor) else torch.empty(tuple(given), device="meta")
        holder = _descend(root, path)
        if hasattr(holder, leaf):
            raise FileError(f'tensor "{name}" clashes with another part of the stored model')
        if name in buffers or not (tensor.is_floating_point() or tensor.is_complex()):
            holder.register_buffer(leaf, tensor)
        else:
            parameter = shared.setdefault(id(given), _parameter(tensor))
            holder.register_parameter(leaf, parameter)
    return root


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _descend(root: Container, path: str) -> Container:
    here = root
    for part in path.split(".") if path else ():
        child = here._modules.get(part)
        if child is None:
            if hasattr(here, part):
                raise FileError(f'module "{path}" clashes with another part of the stored model')
            child = Container()
            here.add_module(part, child)
        if not isinstance(child, Container):
            raise FileError(f'module "{path}" clashes with another part of the stored model')
        here = child
    return here


class Interpreted(nn.Module):
    """A network rebuilt from a stored program: call it like the original.

    It always computes as in evaluation mode: batch norm uses the stored statistics and dropout is
    gone, also after `.train()`; gradients flow to the weights.
    """

    def __init__(
        self, program: Program, tree: nn.Module, constants: Mapping[str, Tensor] | None = None
    ) -> None:
        """Takes over the children and tensors of `tree`, which may be a `skeleton` or any module."""
        super().__init__()
        constants = program.constants if constants is None else constants
        self.program = program
        for name, child in tree.named_children():
            self.add_module(name, child)
        for name, parameter in tree.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in tree.named_buffers(recurse=False):
            persistent = name not in tree._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        self.kind = str(getattr(tree, "kind", type(tree).__name__))
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

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in their order."""
        return list(self.program.inputs)

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

    def __getstate__(self) -> dict[str, Any]:
        hidden = {"_steps", "_arguments", "_padding"}
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()


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
