"""Reads a stored program from JSON that nobody vouches for.

Nothing in the file is executed, imported or looked up beyond fixed tables: every field is checked
for type and bounds, every operator against the allowlist, every reference against the values
before it. What is left can only compute on tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tersor.errors import FileError
from tersor.program.operators import CONSTANT, WEIGHT, known
from tersor.program.program import (
    DTYPES,
    FLOATS,
    MEMORY_FORMATS,
    VERSION,
    Fixed,
    Model,
    Named,
    Node,
    Program,
    Ref,
    Size,
    Slot,
    Span,
    slots,
)
from tersor.program.rules import BrokenRule, check_program

LONGEST_FILE = 64 * 2**20
LONGEST_LIST = 500_000
LONGEST_ARGUMENT = 4096
LONGEST_TEXT = 512
LARGEST_INTEGER = 2**63
LARGEST_SIZE = 2**40
"""Of a dimension that inputs had when traced."""
DEEPEST = 8

_FIELDS = {
    *("program", "inputs", "sizes", "kinds", "modules", "weights", "constants"),
    *("operators", "nodes", "output", "static", "dtype"),
}


def read_program(data: bytes | str, constants: Mapping[str, Tensor]) -> Program:
    """The program in `data`, or FileError with the first thing that is wrong."""
    try:
        fields = _parse(data)
        program = _program(fields, constants)
        check_program(program)
    except BrokenRule as broken:
        raise FileError(
            f"the program stored in the file breaks a rule: {broken}; the file is damaged, hostile "
            "or newer than this tersor, so load its weights alone with load(path, into=your_model)"
        ) from None
    return program


def _parse(data: bytes | str) -> dict[str, Any]:
    _expect(len(data) <= LONGEST_FILE, f"it is longer than {LONGEST_FILE} bytes")
    try:
        fields = json.loads(
            data, object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant
        )
    except RecursionError:
        raise BrokenRule("it is nested too deeply") from None
    except (ValueError, UnicodeError) as error:
        raise BrokenRule(f"it cannot be read as JSON ({error})") from None
    _expect(isinstance(fields, dict), "it is not a JSON object")
    version = fields.get("program")
    _expect(type(version) is int, 'it has no version under "program"')
    _expect(version == VERSION, f"version {version} is not {VERSION}, the one this tersor reads")
    _expect(set(fields) == _FIELDS, f"its fields are not exactly {sorted(_FIELDS)}")
    return dict(fields)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    _expect(len(found) == len(pairs), "a JSON object has the same key twice")
    return found


def _integer(digits: str) -> int:
    _expect(len(digits) <= 20, "an integer does not fit 64 bits")
    value = int(digits)
    _expect(-LARGEST_INTEGER <= value < LARGEST_INTEGER, f"integer {value} does not fit 64 bits")
    return value


def _constant(name: str) -> float:
    raise BrokenRule(f"{name} is not JSON")


def _program(fields: dict[str, Any], constants: Mapping[str, Tensor]) -> Program:
    kinds, buffers, paths = _modules(fields)
    weights = []
    for place, leaf in (_pair(entry, "a weight") for entry in _list(fields["weights"], "weights")):
        path = paths[_index(place, len(paths), "module")]
        weights.append(_name(f"{path}.{leaf}" if path else _text(leaf)))
    names = tuple(_name(name) for name in _list(fields["constants"], "constants"))
    _expect(len(set(weights)) == len(weights), "a weight is listed twice")
    _expect(len(set(names)) == len(names), "a constant is listed twice")
    sizes = tuple(_span(entry) for entry in _list(fields["sizes"], "sizes"))
    inputs: dict[str, Any] = {}
    for name, tree in (_pair(entry, "an input") for entry in _list(fields["inputs"], "inputs")):
        _expect(_name(name) not in inputs, f'input "{name}" is listed twice')
        inputs[name] = _input(tree, sizes, 0)
    operators = [_operator(name) for name in _list(fields["operators"], "operators")]
    first = len(slots(inputs))
    nodes = _nodes(_list(fields["nodes"], "nodes"), operators, first, (len(weights), len(names)))
    dtype = DTYPES.get(_text(fields["dtype"]))
    if dtype is None or not dtype.is_floating_point:
        raise BrokenRule("the dtype is not a floating one")
    return Program(
        inputs=inputs,
        sizes=sizes,
        weights=tuple(weights),
        constant_names=names,
        nodes=nodes,
        output=_output(fields["output"], first + len(nodes), 0),
        kinds=kinds,
        buffers=buffers,
        static=tuple(_text(line) for line in _list(fields["static"], "static")),
        dtype=dtype,
        constants=dict(constants),
    )


def _modules(fields: dict[str, Any]) -> tuple[dict[str, str], tuple[str, ...], list[str]]:
    names = [_text(kind) for kind in _list(fields["kinds"], "kinds")]
    kinds: dict[str, str] = {}
    buffers: list[str] = []
    for entry in _list(fields["modules"], "modules"):
        _expect(isinstance(entry, list) and len(entry) >= 2, "a module is not [path, kind, ...]")
        path, kind, *leaves = entry
        _expect(path not in kinds if isinstance(path, str) else False, "a module is listed twice")
        kinds[_name(path) if path else ""] = names[_index(kind, len(names), "kind")]
        buffers += [_name(f"{path}.{_text(leaf)}".removeprefix(".")) for leaf in leaves]
    return kinds, tuple(buffers), list(kinds)


def _nodes(
    entries: list[Any], operators: list[str], first: int, counts: tuple[int, int]
) -> tuple[Node, ...]:
    nodes: list[Node] = []
    fetched = {WEIGHT: 0, CONSTANT: 0}
    for at, entry in enumerate(entries, first):
        _expect(isinstance(entry, list) and bool(entry), f"node {at} is not a list")
        operator = operators[_index(entry[0], len(operators), "operator")]
        arguments = entry[1:]
        if operator in fetched:
            _expect(not arguments, f"node {at}: {operator} takes no arguments")
            nodes.append(Node(operator, (fetched[operator],)))
            fetched[operator] += 1
            continue
        keywords: dict[str, Any] = arguments.pop() if _is_object(arguments) else {}
        nodes.append(
            Node(
                operator,
                tuple(_value(argument, at, 0) for argument in arguments),
                {_text(name): _value(value, at, 0) for name, value in keywords.items()},
            )
        )
    _expect(tuple(fetched.values()) == counts, "not every weight or constant is fetched once")
    return tuple(nodes)


def _is_object(arguments: list[Any]) -> bool:
    return bool(arguments) and isinstance(arguments[-1], dict)


def _value(coded: Any, at: int, depth: int) -> Any:
    """The argument that `coded` stands for in the node whose value has number `at`."""
    if coded is None or isinstance(coded, bool | int | float):
        return coded
    if isinstance(coded, list):
        _expect(depth < DEEPEST, f"node {at}: lists are nested too deeply")
        _expect(len(coded) <= LONGEST_ARGUMENT, f"node {at}: a list is too long")
        return [_value(part, at, depth + 1) for part in coded]
    text = _text(coded)
    tag, rest = text[:1], text[1:]
    tables: dict[str, Mapping[str, Any]] = {":": DTYPES, "=": MEMORY_FORMATS, "#": FLOATS}
    if tag == "^":
        _expect(rest.isascii() and rest.isdigit(), f"node {at}: {text!r} is no reference")
        _expect(1 <= int(rest) <= at, f"node {at}: {text!r} is not an earlier value")
        return Ref(at - int(rest))
    if tag == "'":
        return rest
    if tag in tables:
        _expect(rest in tables[tag], f"node {at}: {text!r} is unknown")
        return tables[tag][rest]
    _expect(text in (Model.DEVICE.value, Model.DTYPE.value), f"node {at}: {text!r} is unknown")
    return Model(text)


def _input(coded: Any, sizes: tuple[Span, ...], depth: int) -> Any:
    _expect(depth < DEEPEST, "inputs are nested too deeply")
    if isinstance(coded, list):
        _expect(1 <= len(coded) <= 65, "an input is not a type and at most 64 dimensions")
        dtype = _value(coded[0], 0, 0)
        _expect(dtype is Model.DTYPE or isinstance(dtype, torch.dtype), "an input has no type")
        return Slot(tuple(_size(size, sizes) for size in coded[1:]), dtype)
    kind, content = _tagged(coded)
    if kind == "value":
        _expect(not isinstance(content, list), "a fixed input is a list")
        value = _value(content, 0, 0)
        _expect(value is None or isinstance(value, str | bool | int | float), "bad fixed input")
        return Fixed(value)
    return _branches(kind, content, lambda part: _input(part, sizes, depth + 1))


def _output(coded: Any, at: int, depth: int) -> Any:
    _expect(depth < DEEPEST, "outputs are nested too deeply")
    if not isinstance(coded, dict):
        value = _value(coded, at, 0)
        plain = value is None or isinstance(value, Ref | str | bool | int | float)
        _expect(plain, "an output is neither a value, a number nor text")
        return value
    kind, content = _tagged(coded)
    return _branches(kind, content, lambda part: _output(part, at, depth + 1))


def _branches(kind: str, content: Any, read: Any) -> Any:
    if kind in ("tuple", "list"):
        parts = [read(part) for part in _list(content, kind)]
        return tuple(parts) if kind == "tuple" else parts
    _expect(kind in ("dict", "record"), f"{kind!r} is no kind of structure")
    pairs = [_pair(entry, "a named value") for entry in _list(content, kind)]
    fields = {_text(name): read(part) for name, part in pairs}
    _expect(len(fields) == len(pairs), "a name is used twice in one structure")
    if kind == "record":
        _expect(all(not name.startswith("_") for name in fields), "a field starts with _")
    return Named(fields, record=kind == "record")


def _tagged(coded: Any) -> tuple[str, Any]:
    if not isinstance(coded, dict) or len(coded) != 1:
        raise BrokenRule("a structure is not {kind: content}")
    return next(iter(coded.items()))


def _size(coded: Any, sizes: tuple[Span, ...]) -> int | Size | None:
    if isinstance(coded, list):
        _expect(len(coded) in (1, 3), "a free size is not [symbol] or [symbol, factor, offset]")
        _expect(all(type(part) is int for part in coded), "a free size is not of integers")
        _expect(0 <= coded[0] < len(sizes), "a free size has no bounds")
        _expect(len(coded) == 1 or 1 <= coded[1] <= 2**31, "a free size has a bad factor")
        size = Size(*coded)
        traced = size.factor * sizes[size.symbol].traced + size.offset
        _expect(0 <= traced <= LARGEST_SIZE, f"an input was traced with a size of {traced}")
        return size
    _expect(coded is None or (type(coded) is int and coded >= 0), "a size is not a natural number")
    return coded  # type: ignore[no-any-return]


def _span(coded: Any) -> Span:
    _expect(isinstance(coded, list) and len(coded) == 3, "a size is not [low, high, traced]")
    low, high, traced = coded
    _expect(type(low) is int and (high is None or type(high) is int), "bounds are not integers")
    _expect(type(traced) is int, "the size that was traced is not an integer")
    most = LARGEST_SIZE if high is None else min(high, LARGEST_SIZE)
    _expect(max(low, 0) <= traced <= most, f"the size {traced} that was traced is out of bounds")
    return Span(low, high, traced)


def _operator(name: Any) -> str:
    _expect(known(_text(name)), f"operator {name!r} is not on the list of those allowed")
    return str(name)


def _name(name: Any) -> str:
    parts = _text(name).split(".")
    _expect(len(parts) <= 64, f"name {name!r} has too many parts")
    _expect(
        all(part and part.isprintable() and not part.startswith("__") for part in parts),
        f"{name!r} is not the name of a module or tensor",
    )
    return str(name)


def _text(value: Any) -> str:
    _expect(isinstance(value, str), f"{value!r:.60} stands where text belongs")
    _expect(len(value) <= LONGEST_TEXT, f"a text is longer than {LONGEST_TEXT} characters")
    return str(value)


def _list(value: Any, what: str) -> list[Any]:
    _expect(isinstance(value, list), f"{what} is not a list")
    _expect(len(value) <= LONGEST_LIST, f"{what} has more than {LONGEST_LIST} entries")
    return list(value)


def _pair(value: Any, what: str) -> tuple[Any, Any]:
    _expect(isinstance(value, list) and len(value) == 2, f"{what} is not a pair")
    return value[0], value[1]


def _index(value: Any, count: int, what: str) -> int:
    _expect(type(value) is int and 0 <= value < count, f"{value!r:.60} is no {what}'s number")
    return int(value)


def _expect(held: bool, rule: str) -> None:
    if not held:
        raise BrokenRule(rule)
