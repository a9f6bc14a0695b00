"""Grids of activations as QuantizeLinear and DequantizeLinear, which runtimes fuse with products.

ONNX Runtime runs DequantizeLinear -> Conv -> QuantizeLinear as one product of integers
(QLinearConv), a product of two dequantized factors as MatMulIntegerToFloat or QGemm, and
DynamicQuantizeLinear -> MatMulInteger as DynamicQuantizeMatMul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.export.onnx_writer import Writer
from tersor.forms.grid import DynamicGrid, Grid, Rounding
from tersor.surgery.grids import grids, put

DOMAIN = "tersor"

# Operators that only move values about, so that what was a level stays one.
_MOVING = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "MaxPool"}


@dataclass(frozen=True)
class _Static:
    """What two grids must have in common to give the same integers."""

    scale: float
    zero: int
    bits: int
    signed: bool


class GridPlaceholder(Rounding):
    """Stands for a grid while the model is exported."""

    kind = "placeholder"

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """A node of our own that only says which grid belongs here."""
        made = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Grid", (x,), {"index": self.index}, dtype=x.dtype, shape=x.shape, version=1
        )
        assert isinstance(made, Tensor)
        return made


def swap_grids(model: nn.Module) -> list[Grid | DynamicGrid]:
    """Puts a placeholder in the place of every grid, in place, and returns what they stand for.

    A trainable grid is frozen. One with a scale for each row stays, and is traced as it computes.
    """
    found: list[Grid | DynamicGrid] = []
    known: dict[Rounding, GridPlaceholder] = {}
    for _, where, layer, grid in list(grids(model)):
        if grid not in known:
            freeze = getattr(grid, "freeze", None)
            final = freeze() if callable(freeze) else grid
            if not isinstance(final, Grid | DynamicGrid) or getattr(final, "per_row", False):
                continue
            known[grid] = GridPlaceholder(len(found))
            found.append(final)
        put(layer, where, known[grid])
    return found


def fill_grids(graph: Any, found: list[Grid | DynamicGrid], opset: int) -> int:
    """Replaces the placeholders of an onnx_ir graph, in place; returns how many pairs it has now.

    One pair serves all that read the same value on the same grid, and a value that is on the grid
    already passes as it is.
    """
    shared: dict[str, Any] = {}
    made: dict[tuple[Any, Any], Any] = {}
    on: dict[Any, Any] = {}
    for node in _placeholders(graph):
        grid, value = found[node.attributes["index"].as_int()], node.inputs[0]
        key = _key(grid)
        if on.get(_source(value)) == key:
            new = value
        elif (value, key) in made:
            new = made[value, key]
        else:
            writer = Writer(f"grid_{len(made)}", opset, shared)
            new = made[value, key] = _rounded(grid, value, writer)
            graph.insert_before(node, writer.nodes)
            # A part of a value has a range of its own, so only fixed grids last.
            if not isinstance(grid, DynamicGrid):
                on[new] = key
        _reuse(node.outputs[0], new)
        graph.remove(node, safe=True)
    graph.initializers.update(shared)
    return len(made)


def quantized(value: Any) -> bool:
    """Whether `value` lies on a grid, so that products can take its integers."""
    producer = _source(value).producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def dynamic(value: Any) -> Any:
    """The DynamicQuantizeLinear node behind `value`, or None."""
    producer = value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    before = producer.inputs[0].producer()
    is_dynamic = before is not None and before.op_type == "DynamicQuantizeLinear"
    return before if is_dynamic else None


def scale_of(value: Any) -> Any:
    """The scale of the grid that `value` lies on, an initializer unless the grid is dynamic."""
    return _source(value).producer().inputs[1]


def _placeholders(graph: Any) -> list[Any]:
    return [node for node in graph if node.domain == DOMAIN and node.op_type == "Grid"]


def _key(grid: Grid | DynamicGrid) -> Any:
    if isinstance(grid, DynamicGrid):
        return "dynamic"
    return _Static(float(grid.scale), int(grid.zero), grid.bits, grid.signed)


def _source(value: Any) -> Any:
    """Where a value comes from, seen through operators that only move it."""
    producer = value.producer()
    while producer is not None and producer.op_type in _MOVING:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _rounded(grid: Grid | DynamicGrid, value: Any, writer: Writer) -> Any:
    """`value` on the grid, in float32, where the scale is, and back in its own type."""
    wide = writer.cast(value, torch.float32)
    rounded = _levels(grid, wide, writer)
    return rounded if wide is value else writer.op("Cast", rounded, to=int(value.dtype))


def _levels(grid: Grid | DynamicGrid, value: Any, writer: Writer) -> Any:
    if isinstance(grid, DynamicGrid):
        import onnx_ir

        node = onnx_ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
        writer.nodes.append(node)
        return writer.op("DequantizeLinear", *node.outputs)
    if grid.bits < 8:
        # Clipped as floats: integers clipped after QuantizeLinear would keep runtimes from fusing.
        low, high = (torch.tensor(end, dtype=torch.float32) for end in grid.range)
        value = writer.op("Clip", value, writer.constant(low), writer.constant(high))
    kind = torch.int8 if grid.signed else torch.uint8
    scale, zero = writer.constant(grid.scale), writer.constant(grid.zero.to(kind))
    return writer.op(
        "DequantizeLinear", writer.op("QuantizeLinear", value, scale, zero), scale, zero
    )


def _reuse(old: Any, new: Any) -> None:
    from onnx_ir import convenience

    if new.type is None:
        new.type, new.shape = old.type, old.shape
    convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
