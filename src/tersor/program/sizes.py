"""What an exported program demands of its inputs: their types, their free and fixed sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

from tersor.program.call import Call, Untraceable, with_slots
from tersor.program.program import DTYPE_NAMES, Model, Size, Slot, Span, slots

_UNLIMITED = 2**62


class Sizes:
    """The free and fixed sizes of an exported call.

    inputs: the call's trees of inputs with what their sizes may be
    spans: what each free size may be
    static: what is fixed or limited, as sentences
    """

    def __init__(self, exported: ExportedProgram, call: Call, dtype: torch.dtype) -> None:
        """dtype: floating type of the model; inputs of that type follow it."""
        self._ranges = exported.range_constraints
        self._dtype = dtype
        self._numbers: dict[Any, int] = {}
        self.spans: list[Span] = []
        self.static: list[str] = []
        names = set(exported.graph_signature.user_inputs)
        nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
        values = [node.meta["val"] for node in nodes if node.name in names]
        given = [slot for tree in call.inputs.values() for slot in slots(tree)]
        found = zip(values, given, _labels(call.inputs), strict=True)
        supply = iter([self._slot(value, slot, label) for value, slot, label in found])
        self.inputs = {name: with_slots(tree, supply) for name, tree in call.inputs.items()}

    def _slot(self, value: torch.Tensor, given: Slot, label: str) -> Slot:
        if given.dtype not in DTYPE_NAMES:
            raise Untraceable(f'its input "{label}" is of the type {given.dtype}; cast it before')
        shape = tuple(
            self._size(size, traced, f'dimension {dim} of input "{label}"')
            for dim, (size, traced) in enumerate(zip(value.shape, given.shape, strict=True))
        )
        return Slot(shape, Model.DTYPE if given.dtype == self._dtype else given.dtype)

    def _size(self, size: Any, traced: Any, where: str) -> int | Size | None:
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
        number = self._number(symbol, (traced - int(offset)) // int(factor))
        free, high = Size(number, int(factor), int(offset)), self.spans[number].high
        if high is not None:
            self.static.append(f"{where} is at most {high * free.factor + free.offset}")
        if free.factor != 1:
            self.static.append(f"{where} is {free.factor} n + {free.offset}")
        return free

    def _number(self, symbol: Any, traced: int) -> int:
        if symbol not in self._numbers:
            self._numbers[symbol] = len(self._numbers)
            span = self._ranges.get(symbol)
            # torch assumes at least 2 of any size it leaves free; 1 works as well.
            low = int(span.lower) if span is not None and 2 < span.lower < _UNLIMITED else 0
            high = int(span.upper) if span is not None and span.upper < _UNLIMITED else None
            self.spans.append(Span(low, high, traced))
        return self._numbers[symbol]


def _labels(inputs: Any) -> Iterator[str]:
    for name, tree in inputs.items():
        count = len(slots(tree))
        yield from ([name] if count == 1 else [f"{name}[{index}]" for index in range(count)])
