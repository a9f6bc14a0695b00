"""Gives the inputs, outputs and free sizes of an ONNX graph the names that a user knows them by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tersor.program.call import Call
from tersor.program.program import Fixed, Named, Ref, Slot

METADATA = "tersor.call"
"""The key under which a file keeps how its inputs and outputs are arranged, as JSON."""

GRIDS = "tersor.grids"
"""The key under which a file keeps how many of its activations are on a grid, if any are."""


def name_all(
    model: Any, call: Call, tensors: list[Tensor]
) -> tuple[dict[str, tuple[int | str, ...]], tuple[str, ...]]:
    """Gives inputs, outputs and free sizes the names a user knows them by, and notes them."""
    graph = model.graph
    values = iter(graph.inputs)
    arguments = {name: _input_tree(tree, name, values) for name, tree in call.inputs.items()}
    counted: list[str] = []
    tree = _output_tree(call.outputs, "", counted, len(graph.outputs))
    for index, value in enumerate(graph.outputs):
        value.name = counted[index]
    _name_sizes(graph, tensors)
    model.metadata_props.clear()
    model.metadata_props[METADATA] = json.dumps({"inputs": arguments, "output": tree})
    inputs = {value.name: _sizes(value) for value in graph.inputs}
    return inputs, tuple(value.name for value in graph.outputs)


def _input_tree(tree: Any, name: str, values: Iterator[Any]) -> Any:
    """A name for each tensor, in lists and dicts as the argument has them."""
    match tree:
        case Slot():
            next(values).name = name
            return name
        case Fixed():
            return None
        case Named():
            parts = tree.fields.items()
            return {key: _input_tree(part, f"{name}.{key}", values) for key, part in parts}
    return [_input_tree(part, f"{name}.{index}", values) for index, part in enumerate(tree)]


def _output_tree(tree: Any, name: str, names: list[str], count: int) -> Any:
    """A name for each tensor, in {kind: content}; the kinds are those of `onnx_run`."""
    match tree:
        case Ref():
            while len(names) <= tree.index:
                names.append(name or ("output" if count == 1 else f"output_{len(names)}"))
            return {"tensor": names[tree.index]}
        case Named():
            parts = tree.fields.items()
            fields = {k: _output_tree(part, _join(name, k), names, count) for k, part in parts}
            return {"record" if tree.record else "dict": fields}
        case list() | tuple():
            items = [
                _output_tree(part, _join(name, str(i)) if name else "", names, count)
                for i, part in enumerate(tree)
            ]
            return {"list" if isinstance(tree, list) else "tuple": items}
    return {"literal": tree}


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _name_sizes(graph: Any, tensors: list[Tensor]) -> None:
    """Calls the free sizes of the inputs batch, length, length_2, ... instead of s77."""
    import onnx_ir

    names: dict[str, str] = {}
    known: dict[Any, str] = {}
    for value, tensor in zip(graph.inputs, tensors, strict=True):
        for dim, size in enumerate(_sizes(value)):
            if isinstance(size, int) or not size.isidentifier():
                continue
            key = _alike(dim, size, tensor)
            if key not in known:
                lengths = sum(name.startswith("length") for name in known.values())
                length = f"length_{lengths + 1}" if lengths else "length"
                known[key] = "batch" if dim == 0 and "batch" not in known.values() else length
            names.setdefault(size, known[key])
    for value in (*graph.inputs, *graph.outputs):
        value.shape = onnx_ir.Shape([_renamed(size, names) for size in _sizes(value)])


def _alike(dim: int, size: str, tensor: Tensor) -> Any:
    """Equal for sizes that go together though the exporter did not need to know it.

    These are the rows of all inputs, and the lengths of tokens and of the mask over them.
    """
    if dim == 0:
        return "batch", tensor.shape[0]
    return size if tensor.is_floating_point() else (dim, tensor.shape)


def _renamed(size: int | str, names: dict[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), size)


def _sizes(value: Any) -> tuple[int | str, ...]:
    texts = (str(size) for size in value.shape)
    return tuple(int(text) if text.isdigit() else text for text in texts)
