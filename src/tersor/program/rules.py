"""What every program must obey, whether just traced or read from a stranger's file.

Each node must use a listed operator with arguments of the types that the operator declares, refer
to earlier values only, and write to nothing but results of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tersor.program.operators import CONSTANT, ITEM, NUMEL, SIZE, WEIGHT, known, overload
from tersor.program.program import Model, Named, Node, Program, Ref, slots


class BrokenRule(ValueError):
    """A program that must not be stored or run; the message is a sentence."""


TENSOR, NUMBER, SEQUENCE = "a tensor", "a number", "several results"

# Argument that must keep this value: anything else draws random numbers or updates a buffer.
_REQUIRED: dict[str, tuple[str, Any]] = {
    "scaled_dot_product_attention": ("dropout_p", 0),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), ("train", False)),
}
# Same, once running statistics are given.
_STATISTICS = {"batch_norm": "training", "instance_norm": "use_input_stats"}
# May return their argument itself although their schema does not say so.
_UNDECLARED_VIEWS = {"atleast_1d", "atleast_2d", "atleast_3d", "type_as", "broadcast_tensors"}
_UNDECLARED_VIEWS |= {"meshgrid", "pad", "native_layer_norm"}


@dataclass(slots=True)
class _Value:
    kind: str
    owners: frozenset[int]
    """Numbers of the values whose memory this one may share."""


def check_program(program: Program) -> None:
    """Raises BrokenRule on the first node or output that breaks a rule."""
    values = [_Value(TENSOR, frozenset({index})) for index in range(len(slots(program.inputs)))]
    stored: set[int] = set()
    for node in program.nodes:
        try:
            values.append(_checked(node, values, stored))
        except BrokenRule as broken:
            raise BrokenRule(f"node {len(values)} ({node.operator}): {broken}") from None
        if node.operator in (WEIGHT, CONSTANT):
            stored.add(len(values) - 1)
    _check_output(program.output, values)


def _checked(node: Node, values: list[_Value], stored: set[int]) -> _Value:
    here, arguments = len(values), node.arguments
    for argument in (*arguments, *node.keywords.values()):
        _check_references(argument, here)
    if not known(node.operator):
        raise BrokenRule("the operator is not on the list of those a program may use")
    if node.operator in (WEIGHT, CONSTANT):
        return _Value(TENSOR, frozenset({here}))
    if node.operator.startswith("sym."):
        _expect(not node.keywords and 1 <= len(arguments) <= 3, "takes one to three numbers")
        _expect(all(_fits("number", a, values) for a in arguments), "takes numbers only")
        return _Value(NUMBER, frozenset())
    if node.operator in (ITEM, SIZE, NUMEL):
        return _own(node, values, here)
    return _aten(node, values, stored)


def _own(node: Node, values: list[_Value], here: int) -> _Value:
    count = 1 if node.operator == NUMEL else 2
    _expect(not node.keywords and len(node.arguments) == count, f"takes {count} arguments")
    source = node.arguments[0]
    wanted = SEQUENCE if node.operator == ITEM else TENSOR
    _expect(isinstance(source, Ref) and values[source.index].kind == wanted, f"needs {wanted}")
    _expect(count == 1 or type(node.arguments[1]) is int, "needs an integer index")
    if node.operator == ITEM:
        return _Value(TENSOR, values[source.index].owners)
    return _Value(NUMBER, frozenset())


def _aten(node: Node, values: list[_Value], stored: set[int]) -> _Value:
    schema = overload(node.operator)._schema
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    _expect(len(node.arguments) <= len(positional), f"takes at most {len(positional)} arguments")
    named = {argument.name: argument for argument in schema.arguments}
    given = {
        argument.name: value for argument, value in zip(positional, node.arguments, strict=False)
    }
    for name, value in node.keywords.items():
        _expect(name in named and name not in given, f'has no free argument "{name}"')
        given[name] = value
    owners = frozenset({len(values)})
    packet = node.operator.partition(".")[0]
    for place, (name, argument) in enumerate(named.items()):
        if name not in given:
            _expect(argument.has_default_value(), f'lacks its argument "{name}"')
            continue
        value, kind = given[name], str(argument.real_type)
        # torch takes a number for the second tensor of an operator, never for the first.
        kind = "Tensor alone" if kind == "Tensor" and place == 0 else kind
        _expect(_fits(kind, value, values), f'argument "{name}" must be {kind}, not {value!r:.60}')
        memory = argument.alias_info
        if memory is not None or packet in _UNDECLARED_VIEWS:
            owners |= _owners(value, values)
        if memory is not None and memory.is_write:
            _expect(
                owners.isdisjoint(stored), "writes to a weight, buffer or constant of the model"
            )
    _check_frozen(packet, given)
    returned = [str(result.type) for result in schema.returns]
    if returned in (["Tensor"], ["List[Tensor]"]) or len(returned) > 1:
        return _Value(TENSOR if returned == ["Tensor"] else SEQUENCE, owners)
    return _Value(NUMBER, frozenset())


def _owners(value: Any, values: list[_Value]) -> frozenset[int]:
    parts = value if isinstance(value, list | tuple) else (value,)
    found = (values[part.index].owners for part in parts if isinstance(part, Ref))
    return frozenset().union(*found)


def _check_frozen(packet: str, given: Mapping[str, Any]) -> None:
    name, required = _REQUIRED.get(packet, ("", None))
    if name and name in given:
        _expect(given[name] == required, f'"{name}" must be {required}: no random numbers here')
    tracked = (given.get("running_mean"), given.get("running_var")) != (None, None)
    if packet in _STATISTICS and tracked:
        name = _STATISTICS[packet]
        _expect(given.get(name) is False, f'"{name}" must be false with running statistics')


def _fits(kind: str, value: Any, values: list[_Value]) -> bool:
    """Whether `value` may be given for a schema type such as "Optional[List[int]]"."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[9:-1], value, values)
    if kind.startswith("List["):
        if isinstance(value, list | tuple):
            return all(_fits(kind[5:-1], part, values) for part in value)
        # torch takes one number where all dimensions share it, and a result list as a list.
        sequence = isinstance(value, Ref) and values[value.index].kind == SEQUENCE
        return sequence if "Tensor" in kind else _fits(kind[5:-1], value, values)
    if isinstance(value, Ref):
        found = values[value.index].kind
        numeric = found == NUMBER and kind in ("int", "float", "bool", "number", "Tensor")
        return numeric or (found == TENSOR and kind in ("Tensor", "Tensor alone"))
    return _literal_fits(kind, value)


def _literal_fits(kind: str, value: Any) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("int", "float"):
        return type(value) in ((int,) if kind == "int" else (int, float))
    if kind in ("number", "Tensor"):
        return isinstance(value, bool | int | float)
    if kind == "ScalarType":
        return isinstance(value, torch.dtype) or value is Model.DTYPE
    types = {"str": str, "MemoryFormat": torch.memory_format}
    return value is Model.DEVICE if kind == "Device" else isinstance(value, types.get(kind, ()))


def _check_references(value: Any, here: int) -> None:
    if isinstance(value, Ref):
        _expect(0 <= value.index < here, f"refers to value {value.index}, which is not earlier")
    elif isinstance(value, list | tuple):
        for part in value:
            _check_references(part, here)


def _check_output(tree: Any, values: list[_Value]) -> None:
    if isinstance(tree, Ref):
        if not 0 <= tree.index < len(values):
            raise BrokenRule(f"the output refers to value {tree.index} of {len(values)}")
    elif isinstance(tree, Named | list | tuple):
        for part in tree.fields.values() if isinstance(tree, Named) else tree:
            _check_output(part, values)


def _expect(held: bool, rule: str) -> None:
    if not held:
        raise BrokenRule(rule)
