"""Residual streams and value paths of a network, found in what one run shows.

Source: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 4, for what must be known of both
to rotate them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from tersor.errors import OptionError
from tersor.measure.flow import PASSING, Flow, Value
from tersor.methods.placing import is_linear
from tersor.methods.rescaling import is_norm
from tersor.surgery.walk import kind_of

_PRODUCTS = frozenset({"bmm", "matmul", "mm"})
_REPEATING = PASSING | {"index_select", "index", "repeat", "repeat_interleave"}
_SUMS = frozenset({"add", "sub"})


@dataclass
class Stream:
    """Layers around a sum that runs through a network.

    writers: linear layers and embeddings whose outputs are added up
    norms: with the linear layers that read each
    """

    writers: list[nn.Module] = field(default_factory=list)
    norms: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)

    def readers(self) -> list[nn.Module]:
        """All linear layers behind norms."""
        return [layer for layers in self.norms.values() for layer in layers]

    def layers(self) -> list[nn.Module]:
        """All but the norms."""
        return [*self.writers, *self.readers()]


class _Unknown(Exception):
    """Why a sum is no stream that can be rotated."""


def stream(flow: Flow, names: dict[nn.Module, str]) -> Stream | None:
    """The residual stream that RMS norms read, None for a network without such norms.

    Raises OptionError where something else reads or writes it.
    """
    norms = [module for module in flow.calls if kind_of(module).endswith("RMSNorm")]
    if not norms:
        return None
    found = Stream()
    try:
        for value in _connected(flow, norms):
            _note(flow, value, found)
        for norm in found.norms:
            found.norms[norm] = _readers(flow, norm)
    except _Unknown as reason:
        told = " ".join(names.get(part, str(part)) for part in reason.args)
        raise OptionError(
            f"the residual stream cannot be rotated: {told}; leave this step out, "
            "quantize.trellis rotates inside each weight"
        ) from None
    return found


def _connected(flow: Flow, norms: list[nn.Module]) -> list[Value]:
    """All values that the first norm's input is a sum or a part of, up to layers and norms."""
    start = flow.calls[norms[0]][0][0]
    left, seen = [start] if start is not None else [], dict[Value, None]()
    while left:
        value = left.pop()
        if value in seen:
            continue
        seen[value] = None
        if _giver(value) is None and (value.operator in _SUMS or value.operator in PASSING):
            left += value.inputs if value.operator in _SUMS else value.inputs[:1]
        for operator, inside, made in value.uses:
            if operator in _SUMS or operator in PASSING:
                inner = [m for m in inside if is_norm(m) or is_linear(m)]
                left += () if inner else made
    return list(seen)


def _giver(value: Value) -> nn.Module | None:
    """The linear layer or embedding that gives a value."""
    return next((m for m in value.givers if is_linear(m) or isinstance(m, nn.Embedding)), None)


def _note(flow: Flow, value: Value, found: Stream) -> None:
    """Notes who gives and who reads a value of the stream."""
    giver = _giver(value)
    if giver is not None:
        if not flow.once(giver):
            raise _Unknown(giver, "writes it more than once")
        found.writers.append(giver)
    elif value.operator not in _SUMS and value.operator not in PASSING:
        raise _Unknown(f"{value.operator or 'a tensor that no layer gave'} writes it")
    for operator, inside, _ in value.uses:
        norm = next((m for m in inside if kind_of(m).endswith("RMSNorm")), None)
        if norm is not None:
            if not flow.once(norm):
                raise _Unknown(norm, "reads it more than once")
            found.norms.setdefault(norm, [])
        elif operator not in _SUMS and operator not in PASSING:
            raise _Unknown(f"{operator} reads it")


def _readers(flow: Flow, norm: nn.Module) -> list[nn.Module]:
    """The linear layers that read what a norm gives, if nothing else does."""
    value = flow.calls[norm][0][1]
    readers: dict[nn.Module, None] = {}
    for operator, inside, _ in value.uses if value is not None else ():
        layer = next((m for m in inside if is_linear(m)), None)
        if layer is None or flow.calls[layer][0][0] is not value or not flow.once(layer):
            raise _Unknown(f"{operator} reads what", norm, "gives")
        readers[layer] = None
    return list(readers)


def value_paths(flow: Flow) -> Iterator[tuple[nn.Module, nn.Module, int]]:
    """(value layer, output layer, width of a head) of every attention between two linear layers.

    An output layer reads softmax(...) @ values, where nothing but views and copies lie between.
    """
    for layer in flow.calls:
        if not is_linear(layer) or not flow.once(layer):
            continue
        start = flow.calls[layer][0][0]
        values = _attended(_behind(start, PASSING)) if start is not None else None
        giver = _given(values) if values is not None else None
        if values is not None and giver is not None and flow.once(giver):
            yield giver, layer, values.shape[-1]


def _attended(product: Value) -> Value | None:
    """The values of an attention, given what comes out of it."""
    if "scaled_dot_product" in product.operator:
        return product.inputs[2]
    if product.operator not in _PRODUCTS or len(product.inputs) < 2:
        return None
    weights = _behind(product.inputs[0], PASSING | {"dropout", "native_dropout"})
    return product.inputs[1] if "softmax" in weights.operator else None


def _behind(value: Value, operators: frozenset[str]) -> Value:
    while value.operator in operators and value.inputs:
        value = value.inputs[0]
    return value


def _given(value: Value) -> nn.Module | None:
    """The linear layer that gave a value, through views and copies."""
    while True:
        giver = next((m for m in value.givers if is_linear(m)), None)
        if giver is not None or value.operator not in _REPEATING or not value.inputs:
            return giver
        value = value.inputs[0]
