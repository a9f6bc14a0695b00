"""Which sizes of the inputs an exported program leaves free, and what it fixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

from tersor.program.call import Call, reshaped
from tersor.program.program import Size, slots

_UNLIMITED = 2**62


class Sizes:
    """The free and fixed sizes of an exported call.

    inputs: the call's trees of inputs with their shapes
    bounds: smallest and largest value (None: no limit) of each free size
    static: what is fixed or limited, as sentences
    """

    def __init__(self, exported: ExportedProgram, call: Call) -> None:
        self._ranges = exported.range_constraints
        self._numbers: dict[Any, int] = {}
        self._limits: list[tuple[int, int | None]] = []
        self.static: list[str] = []
        names = set(exported.graph_signature.user_inputs)
        nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
        values = [node.meta["val"] for node in nodes if node.name in names]
        labels = iter(_labels(call.inputs))
        shapes = [self._shape(value, next(labels)) for value in values]
        supply = iter(shapes)
        self.inputs = {name: reshaped(tree, supply) for name, tree in call.inputs.items()}
        self.bounds = tuple(self._limits)

    def _shape(self, value: torch.Tensor, label: str) -> tuple[int | Size | None, ...]:
        return tuple(
            self._size(size, f'dimension {dim} of input "{label}"')
            for dim, size in enumerate(value.shape)
        )

    def _size(self, size: Any, where: str) -> int | Size | None:
        expression = None if isinstance(size, int) else size.node.expr
        if expression is None or expression.is_Integer:
            self.static.append(f"{where} is fixed at {int(size)}")
            return int(size)
        symbols = list(expression.free_symbols)
        if len(symbols) != 1:
            return None
        symbol = symbols[0]
        factor, offset = expression.diff(symbol), expression.subs(symbol, 0)
        if not (factor.is_Integer and offset.is_Integer and factor > 0):
            return None
        free = Size(self._number(symbol), int(factor), int(offset))
        high = self._limits[free.symbol][1]
        if high is not None:
            self.static.append(f"{where} is at most {high * free.factor + free.offset}")
        if free.factor != 1:
            self.static.append(f"{where} is {free.factor} n + {free.offset}")
        return free

    def _number(self, symbol: Any) -> int:
        if symbol not in self._numbers:
            self._numbers[symbol] = len(self._numbers)
            span = self._ranges.get(symbol)
            # torch assumes at least 2 of any size it leaves free; 1 works as well.
            low = int(span.lower) if span is not None and 2 < span.lower < _UNLIMITED else 0
            high = int(span.upper) if span is not None and span.upper < _UNLIMITED else None
            self._limits.append((low, high))
        return self._numbers[symbol]


def _labels(inputs: Any) -> Iterator[str]:
    for name, tree in inputs.items():
        count = len(slots(tree))
        yield from ([name] if count == 1 else [f"{name}[{index}]" for index in range(count)])
