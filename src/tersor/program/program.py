"""A stored program: the forward pass of a network as plain data, without its code.

A program is a list of nodes, each an operator of the allowlist applied to earlier values. Values
are numbered: first the input tensors, in the order of the input trees, then one per node. Weights
are fetched by name when their first user needs them, so a program never contains weight values.

As JSON a node is `[operator, argument, ..., {keyword arguments}]`, the operator an index into the
table "operators". An argument is a JSON number, boolean, null or list, or a string whose first
character tells what follows: `^3` the value three before this node's, `'same` text, `:float32` a
dtype, `#inf` a float that JSON cannot say, `=channels_last` a memory format, `@` the device of the
model, `~` its dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

VERSION = 1

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
    )
}
MEMORY_FORMATS = {
    str(form).removeprefix("torch."): form
    for form in (
        *(torch.contiguous_format, torch.preserve_format),
        *(torch.channels_last, torch.channels_last_3d),
    )
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MEMORY_FORMAT_NAMES = {form: name for name, form in MEMORY_FORMATS.items()}
FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class Model(Enum):
    """An argument that is read from the model when the program runs."""

    DEVICE = "@"
    DTYPE = "~"


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of an input (the first ones) or of a node (the rest)."""

    index: int


@dataclass(frozen=True, slots=True)
class Node:
    """An operator and its arguments: literals, `Ref`s, dtypes, `Model` markers, lists of these."""

    operator: str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Size:
    """A dimension that may change: `factor * n + offset` for the free size `n`."""

    symbol: int
    factor: int = 1
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """What a free size may be, low..high (None: no limit), and what it was when traced."""

    low: int
    high: int | None
    traced: int


@dataclass(frozen=True, slots=True)
class Slot:
    """An input tensor. Each dimension is a fixed size, a free `Size`, or None for unchecked.

    dtype: of the example; `Model.DTYPE` where it was the model's own
    """

    shape: tuple[int | Size | None, ...]
    dtype: torch.dtype | Model


@dataclass(frozen=True, slots=True)
class Fixed:
    """An input that is no tensor: it must have the value that it had when the model was traced."""

    value: str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Named:
    """Outputs with names: a dict, or (`record`) one also readable as attributes and by position."""

    fields: Mapping[str, Any]
    record: bool = False


@dataclass(frozen=True)
class Program:
    """The forward pass of a network, and what is needed to rebuild a module around it.

    inputs: name of each argument -> tree of `Slot` and `Fixed` (tuples, lists, `Named`)
    sizes: what each free size may be, by the number that `Size.symbol` has
    weights: names of the parameters and buffers, in the order of the "weight" nodes
    constant_names: the same for the "constant" nodes; `constants` has the tensors
    output: tree of `Ref`s and literals
    kinds: path of each module that owns tensors -> name of its layer type
    buffers: names of the tensors in `kinds`' modules that are buffers, not parameters
    static: what can no longer change, as sentences
    dtype: floating type of the model; follows `.to(dtype)` where the program says so
    """

    inputs: Mapping[str, Any]
    sizes: tuple[Span, ...]
    weights: tuple[str, ...]
    constant_names: tuple[str, ...]
    nodes: tuple[Node, ...]
    output: Any
    kinds: Mapping[str, str]
    buffers: tuple[str, ...]
    static: tuple[str, ...]
    dtype: torch.dtype
    constants: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def to_json(self) -> bytes:
        """The program as compact JSON; the constants' values are left to the caller."""
        return json.dumps(
            _encode(self), separators=(",", ":"), allow_nan=False, ensure_ascii=False
        ).encode()

    @staticmethod
    def from_json(data: bytes | str, constants: Mapping[str, Tensor] | None = None) -> Program:
        """Reads what `to_json` wrote; anything else raises a FileError saying what is wrong."""
        from tersor.program.reader import read_program

        return read_program(data, constants or {})


def slots(tree: Any) -> list[Slot]:
    """The input tensors of a tree of inputs, in order."""
    if isinstance(tree, Slot):
        return [tree]
    branches = tree.values() if isinstance(tree, Mapping) else tree
    if isinstance(tree, Fixed):
        branches = ()
    elif isinstance(tree, Named):
        branches = tree.fields.values()
    return [slot for branch in branches for slot in slots(branch)]


def split_name(name: str) -> tuple[str, str]:
    """("layer1.0", "weight") for "layer1.0.weight"."""
    path, _, leaf = name.rpartition(".")
    return path, leaf


def _encode(program: Program) -> dict[str, Any]:
    operators = list(dict.fromkeys(node.operator for node in program.nodes))
    index = {name: i for i, name in enumerate(operators)}
    first = len(slots(program.inputs))
    kinds = list(dict.fromkeys(program.kinds.values()))
    modules: dict[str, list[Any]] = {
        path: [path, kinds.index(kind)] for path, kind in program.kinds.items()
    }
    for name in program.buffers:
        path, leaf = split_name(name)
        modules[path].append(leaf)
    places = {path: i for i, path in enumerate(modules)}
    weights = [split_name(name) for name in program.weights]
    return {
        "program": VERSION,
        "inputs": [[name, _encode_input(tree)] for name, tree in program.inputs.items()],
        "sizes": [[span.low, span.high, span.traced] for span in program.sizes],
        "kinds": kinds,
        "modules": list(modules.values()),
        "weights": [[places[path], leaf] for path, leaf in weights],
        "constants": list(program.constant_names),
        "operators": operators,
        "nodes": [_encode_node(node, index, at) for at, node in enumerate(program.nodes, first)],
        "output": _encode_output(program.output, first + len(program.nodes)),
        "static": list(program.static),
        "dtype": DTYPE_NAMES[program.dtype],
    }


def _encode_node(node: Node, index: Mapping[str, int], at: int) -> list[Any]:
    # The index of a weight or constant is not written: each node takes the next one.
    own = node.operator in ("weight", "constant")
    coded: list[Any] = [index[node.operator]]
    coded += [] if own else [_encode_value(argument, at) for argument in node.arguments]
    if node.keywords:
        coded.append({name: _encode_value(value, at) for name, value in node.keywords.items()})
    return coded


def _encode_value(value: Any, at: int) -> Any:
    match value:
        case Ref():
            return f"^{at - value.index}"
        case Model():
            return value.value
        case str():
            return f"'{value}"
        case torch.dtype():
            return f":{DTYPE_NAMES[value]}"
        case torch.memory_format():
            return f"={MEMORY_FORMAT_NAMES[value]}"
        case list() | tuple():
            return [_encode_value(part, at) for part in value]
        case float() if not math.isfinite(value):
            return f"#{value}"
    return value


def _encode_input(tree: Any) -> Any:
    match tree:
        case Slot():
            return [_encode_value(tree.dtype, 0), *(_encode_size(size) for size in tree.shape)]
        case Fixed():
            return {"value": _encode_value(tree.value, 0)}
        case Named():
            return {"dict": [[name, _encode_input(part)] for name, part in tree.fields.items()]}
    return {type(tree).__name__: [_encode_input(part) for part in tree]}


def _encode_size(size: int | Size | None) -> Any:
    if not isinstance(size, Size):
        return size
    whole = [size.symbol, size.factor, size.offset]
    return whole if (size.factor, size.offset) != (1, 0) else whole[:1]


def _encode_output(tree: Any, at: int) -> Any:
    match tree:
        case Named():
            kind = "record" if tree.record else "dict"
            return {kind: [[name, _encode_output(part, at)] for name, part in tree.fields.items()]}
        case list() | tuple():
            return {type(tree).__name__: [_encode_output(part, at) for part in tree]}
    return _encode_value(tree, at)
