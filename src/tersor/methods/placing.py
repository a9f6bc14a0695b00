"""Where grids go, so that a runtime can compute with integers between them.

Linear layers get one on their input, so that what flows around them (a residual stream, norms,
attention) stays float. Around convolutions the values themselves are rounded, where they are made
if that is a module's output, so that everything that reads them, the addition of a shortcut too,
reads the same integers, and these can stay integers from layer to layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from tersor.measure.flow import PASSING, RECTIFIERS, Flow, Value
from tersor.surgery.grids import Where
from tersor.surgery.walk import kind_of

Place = tuple[nn.Module, Where]


@dataclass(eq=False)
class Spot:
    """One grid to be.

    places: where it sits, with the value that is rounded there in the watched run
    layers: whose products it makes integer
    """

    places: dict[Place, Value] = field(default_factory=dict)
    layers: list[nn.Module] = field(default_factory=list)

    def seen(self) -> Iterator[Place]:
        """Places to look at its values: not where they are passed on to from another place."""
        values: set[Value] = set()
        for place, value in self.places.items():
            if not values.intersection(value.origins()):
                yield place
            values.add(value)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer multiplies its first input by a matrix; GPT-2 has its own kind."""
    return isinstance(layer, nn.Linear) or kind_of(layer) == "Conv1D"


def spots(flow: Flow, layers: Collection[nn.Module]) -> list[Spot]:
    """The grids for those of `layers` that are linear or convolutions and were called."""
    placing = _Placing(flow)
    called = [layer for layer in flow.calls if layer in layers]
    convolutions: list[nn.Module] = [layer for layer in called if isinstance(layer, _ConvNd)]
    for layer in convolutions:
        placing.convolution_input(layer)
    for layer in called:
        if is_linear(layer):
            placing.linear_input(layer)
    for layer in convolutions:
        placing.convolution_output(layer)
    return list(dict.fromkeys(placing.spot.values()))


class _Placing:
    """spot: of each value that is rounded. everywhere: values that nobody reads unrounded."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.spot: dict[Value, Spot] = {}
        self.everywhere: set[Value] = set()

    def convolution_input(self, layer: nn.Module) -> None:
        values = self._inputs(layer)
        if len(values) > 1:
            self._linear_like(layer, values)
            return
        for value in values:
            if value not in self.everywhere:
                self._round(value, *(self._source(value) or ((layer, "input"), False)))
            self._feed(value, layer)

    def linear_input(self, layer: nn.Module) -> None:
        self._linear_like(layer, self._inputs(layer))

    def convolution_output(self, layer: nn.Module) -> None:
        """A runtime keeps integers only of a convolution that is rounded again right behind it."""
        if not self.flow.once(layer):
            return
        value = self.flow.calls[layer][0][1]
        value = value and self._behind_norm(value)
        if value is None or value in self.spot or self._leaves(value):
            return
        if len(value.uses) == 1 and value.uses[0][0] in RECTIFIERS:
            rectified = value.uses[0][2][0]
            if self._rounded(rectified):
                return
            giver = self._giver(rectified)
            if giver is not None:
                self._round(rectified, (giver, "output"), True)
                return
        giver = self._giver(value)
        if giver is not None:
            self._round(value, (giver, "output"), True)

    def _inputs(self, layer: nn.Module) -> list[Value]:
        return list(dict.fromkeys(v for v, _ in self.flow.calls[layer] if v is not None))

    def _linear_like(self, layer: nn.Module, values: list[Value]) -> None:
        """On the layer's own input; one grid for all that is ever fed to it, or to its sisters."""
        for value in values:
            if value in self.everywhere:
                self._feed(value, layer)
            else:
                self._round(value, (layer, "input"), False)
                self._feed(value, layer)
        for value in values[1:]:
            self._join(self.spot[values[0]], self.spot[value])

    def _source(self, value: Value) -> tuple[Place, bool] | None:
        """Where the value itself can be rounded, for all that read it."""
        giver = self._giver(value)
        if giver is not None:
            return (giver, "output"), True
        for module in reversed(value.enters):
            if self.flow.once(module) and all(module in inside for _, inside, _ in value.uses):
                return (module, "input"), True
        return None

    def _giver(self, value: Value) -> nn.Module | None:
        """The innermost module whose output it is, among those that run just once."""
        return next((module for module in value.givers if self.flow.once(module)), None)

    def _round(self, value: Value, place: Place, everywhere: bool) -> None:
        spot = next((self.spot[v] for v in value.origins() if v in self.spot), None) or Spot()
        self.spot[value] = spot
        spot.places.setdefault(place, value)
        if everywhere:
            self.everywhere.add(value)
        for passed in _passed_on(value):
            if passed in self.spot:
                self._join(spot, self.spot[passed])

    def _feed(self, value: Value, layer: nn.Module) -> None:
        if layer not in self.spot[value].layers:
            self.spot[value].layers.append(layer)

    def _join(self, kept: Spot, other: Spot) -> None:
        if kept is not other:
            kept.places |= other.places
            kept.layers += [layer for layer in other.layers if layer not in kept.layers]
            for value in [v for v, spot in self.spot.items() if spot is other]:
                self.spot[value] = kept

    def _rounded(self, value: Value) -> bool:
        """Whether all that reads the value reads it rounded, or what a maximum makes of it."""
        if value in self.everywhere:
            return True
        return bool(value.uses) and all(
            operator in PASSING and bool(made) and self._rounded(made[0])
            for operator, _, made in value.uses
        )

    def _leaves(self, value: Value) -> bool:
        """Whether nothing but rearranging comes after it: an answer keeps all of its digits."""
        return all(
            operator in PASSING and all(self._leaves(v) for v in made)
            for operator, _, made in value.uses
        )

    def _behind_norm(self, value: Value) -> Value:
        """The output of the batch norm that alone reads the value, if one does."""
        if len(value.uses) == 1:
            _, inside, made = value.uses[0]
            if inside and isinstance(inside[-1], _BatchNorm) and made:
                return made[0]
        return value


def _passed_on(value: Value) -> Iterator[Value]:
    for operator, _, made in value.uses:
        if operator in PASSING and made:
            yield made[0]
            yield from _passed_on(made[0])
