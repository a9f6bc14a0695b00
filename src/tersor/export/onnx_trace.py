"""Runs torch's exporter on a model whose forms are placeholders, and names what comes out."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config

from tersor.codec.program import Fixed, Named, Ref, Slot
from tersor.codec.trace_call import Call, Untraceable
from tersor.errors import CompressError, ExportError
from tersor.export.onnx_graph import DOMAIN, Weight, fill, swap

METADATA = "tersor.call"
"""The key under which a file keeps how its inputs and outputs are arranged, as JSON."""


@dataclass(frozen=True)
class Graph:
    """An onnx_ir model, the weights in it, and the names and sizes of its inputs and outputs."""

    model: Any
    weights: list[Weight]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]


def build(call: Call, tensors: list[Tensor], opset: int) -> Graph:
    """The ONNX graph of `call`, whose model loses its forms to placeholders."""
    kind = type(call.model).__name__
    _run_once(call, tensors, kind)
    weights = swap(call.model)
    with quiet():
        model = _exported(call, tensors, opset, kind)
        fill(model.graph, weights, opset)
    inputs, outputs = _named(model, call)
    _tidied(model)
    return Graph(model, weights, inputs, outputs)


def _run_once(call: Call, tensors: list[Tensor], kind: str) -> None:
    try:
        call(*[tensor.clone() for tensor in tensors])
    except CompressError:
        raise
    except Untraceable as error:
        raise ExportError(f"{kind} cannot be exported to ONNX: {error}") from None
    except Exception as error:
        raise ExportError(
            f"{kind} fails on the example inputs: {first_line(error)}; give inputs that it accepts"
        ) from error


def _every(dim: int, rank: int) -> bool:
    return dim == 0 or rank <= 3


def _rows(dim: int, rank: int) -> bool:
    return dim == 0


def _none(dim: int, rank: int) -> bool:
    return False


# Which dimensions may vary, tried in turn; the first attempt also asks torch.export not to treat a
# size of 1 as special. Images keep their size, which runtimes use to plan memory.
_ATTEMPTS: tuple[tuple[Callable[[int, int], bool], bool], ...] = (
    (_every, True),
    (_every, False),
    (_rows, False),
    (_none, False),
)


def _exported(call: Call, tensors: list[Tensor], opset: int, kind: str) -> Any:
    reasons = []
    for free, oblivious in _ATTEMPTS:
        try:
            program = _program(call, tensors, free, oblivious)
            exported = torch.onnx.export(
                program, (), dynamo=True, optimize=True, opset_version=opset, verbose=False
            )
        except Exception as error:  # noqa: BLE001 - the exporter raises errors of many types
            reasons.append(first_line(error.__cause__ or error))
        else:
            assert exported is not None
            return exported.model
    raise ExportError(
        f"{kind} cannot be exported to ONNX: {reasons[-1]}; write the part that it names with other "
        "operators, or export the part of the network that runs on the device"
    )


def _program(
    call: Call, tensors: list[Tensor], free: Callable[[int, int], bool], oblivious: bool
) -> ExportedProgram:
    kinds = {True: Dim.AUTO, False: Dim.STATIC}  # type: ignore[attr-defined]
    shapes = tuple(tuple(kinds[free(dim, x.dim())] for dim in range(x.dim())) for x in tensors)
    with ExitStack() as stack:
        if oblivious:
            stack.enter_context(symbolic_config.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
        given = tuple(tensor.clone() for tensor in tensors)
        return torch.export.export(call, given, dynamic_shapes=(shapes,), strict=False)


def _named(
    model: Any, call: Call
) -> tuple[dict[str, tuple[int | str, ...]], tuple[str, ...]]:
    """Gives inputs, outputs and free sizes the names a user knows them by, and notes them."""
    graph = model.graph
    values = iter(graph.inputs)
    arguments = {name: _input_tree(tree, name, values) for name, tree in call.inputs.items()}
    counted: list[str] = []
    tree = _output_tree(call.outputs, "", counted, len(graph.outputs))
    for index, value in enumerate(graph.outputs):
        value.name = counted[index]
    _name_sizes(graph)
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
    """{"tensor": name}, {"list" or "tuple": [...]}, {"dict" or "record": {...}} or {"literal": x}."""
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
            parts = enumerate(tree)
            items = [
                _output_tree(part, _join(name, str(i)) if name else "", names, count)
                for i, part in parts
            ]
            return {"list" if isinstance(tree, list) else "tuple": items}
    return {"literal": tree}


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _name_sizes(graph: Any) -> None:
    """Calls the free sizes of the inputs batch, length, length_2, ... instead of s77."""
    import onnx_ir

    names: dict[str, str] = {}
    for value in graph.inputs:
        for dim, size in enumerate(_sizes(value)):
            if isinstance(size, str) and size.isidentifier() and size not in names:
                lengths = sum(name != "batch" for name in names.values())
                other = f"length_{lengths + 1}" if lengths else "length"
                first = dim == 0 and "batch" not in names.values()
                names[size] = "batch" if first else other
    for value in (*graph.inputs, *graph.outputs):
        sizes = [
            size
            if isinstance(size, int)
            else re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), size)
            for size in _sizes(value)
        ]
        value.shape = onnx_ir.Shape(sizes)


def _sizes(value: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def _tidied(model: Any) -> None:
    """Removes what nobody reads: traces of the source code, shapes in between, unused nodes."""
    from onnx_ir.passes import common

    outer = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value not in outer:
                value.shape = value.type = None
    model.opset_imports.pop(DOMAIN, None)
    for step in (
        common.ClearMetadataAndDocStringPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.NameFixPass(),
    ):
        step(model)


def first_line(error: BaseException) -> str:
    """What an error says first, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress lines, log lines and warnings of the exporters away."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
