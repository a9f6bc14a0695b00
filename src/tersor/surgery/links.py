"""The links of a chain: which ranks a layer has, what they compute, and links without values.

`chain` says what each kind is, and puts links in a layer's place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from tersor.surgery.walk import kind_of

Ranks = tuple[int, ...]
Sizes = tuple[int, ...]
CONVOLUTIONS = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}
LINEAR = ("Linear", "Conv1D")


class Core(nn.Module):
    """One contraction of a tensor train.

    x: (..., rank * factor * rest), the inputs that cores after it take ahead of the outputs of
    those before it in `rest` -> (..., next rank * rest * outputs)
    """

    def __init__(self, linear: nn.Linear, rank: int, features: tuple[int, int]) -> None:
        """linear: (rank * factor) -> (next rank * outputs); rank: the next

        features: inputs and outputs of the whole chain
        """
        super().__init__()
        self.linear, self.rank = linear, rank
        self.in_features, self.out_features = features

    def forward(self, x: Tensor) -> Tensor:
        """Takes its own factor of the inputs, and puts its outputs behind the others."""
        rest = x.reshape(*x.shape[:-1], self.linear.in_features, -1).transpose(-1, -2)
        given: Tensor = self.linear(rest)
        return given.reshape(*given.shape[:-1], self.rank, -1).transpose(-2, -3).flatten(-3)


class Shift(nn.Module):
    """Adds a bias, where there is one."""

    bias: nn.Parameter | None

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.out_features = outputs
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., outputs)"""
        return x if self.bias is None else x + self.bias


def sizes_of(layer: nn.Module) -> Sizes:
    """(outputs, inputs, *kernel) of a layer's weight."""
    shape = tuple(cast("Tensor", layer.weight).shape)
    return shape[::-1] if kind_of(layer) == "Conv1D" else shape


def fit(sizes: Sizes, made_by: str, ranks: Ranks) -> bool:
    """Whether ranks are of a chain for such a weight, none of them larger than one needs."""
    if not all(type(rank) is int and rank > 0 for rank in ranks):
        return False
    whole, outputs, inputs = math.prod(sizes), sizes[0], sizes[1]
    match made_by:
        case "low_rank":
            return len(ranks) == 1 and ranks[0] <= min(outputs, whole // outputs)
        case "tucker":
            return len(ranks) == 2 and ranks[0] <= inputs and ranks[1] <= outputs
        case "cp":
            return len(ranks) == 1 and ranks[0] <= whole // max(sizes)
    count = (len(ranks) + 1) // 3
    if count < 2 or len(ranks) != 3 * count - 1:
        return False
    first, second, between = ranks[:count], ranks[count : 2 * count], ranks[2 * count :]
    if math.prod(first) != inputs or math.prod(second) != outputs:
        return False
    modes = [a * b for a, b in zip(first, second, strict=True)]
    return all(
        rank <= min(math.prod(modes[:at]), math.prod(modes[at:]))
        for at, rank in enumerate(between, 1)
    )


def work(
    layer: nn.Module, made_by: str, ranks: Ranks, given: Sequence[int], gives: Sequence[int]
) -> list[tuple[int, int]]:
    """(numbers, uses) of each link: how many weights it has, and how often a call uses each.

    given, gives: shapes of what the layer takes and returns in that call
    """
    outputs, inputs, *kernel = sizes_of(layer)
    if kind_of(layer) in LINEAR:
        calls = math.prod(given) // inputs
        if made_by == "low_rank":
            return [(ranks[0] * inputs, calls), (outputs * ranks[0], calls)]
        return [(a * b, calls * rest) for a, b, rest in _cores(ranks)]
    batch, before, after = given[0], given[2:], gives[2:]
    calls = batch * math.prod(after)
    match made_by:
        case "low_rank":
            return [(ranks[0] * inputs * math.prod(kernel), calls), (outputs * ranks[0], calls)]
        case "tucker":
            first = (ranks[0] * inputs, batch * math.prod(before))
            core = (ranks[0] * ranks[1] * math.prod(kernel), calls)
            return [first, core, (outputs * ranks[1], calls)]
    # A kernel along a dimension leaves that dimension as it will be.
    places = [(*after[:at], *before[at:]) for at in range(len(kernel) + 1)]
    along = [(ranks[0] * n, batch * math.prod(places[at + 1])) for at, n in enumerate(kernel)]
    return [(ranks[0] * inputs, batch * math.prod(before)), *along, (outputs * ranks[0], calls)]


def factors_of(number: int, count: int) -> Ranks:
    """Numbers near each other whose product is `number`, falling; ones where it has no factors."""
    found, divisor, primes = [1] * count, 2, []
    while number > 1:
        while number % divisor == 0:
            primes.append(divisor)
            number //= divisor
        divisor = divisor + 1 if divisor * divisor <= number else number
    for prime in reversed(primes):
        found[found.index(min(found))] *= prime
    return tuple(sorted(found, reverse=True))


def _cores(ranks: Ranks) -> list[tuple[int, int, int]]:
    """(inputs, outputs, rest) of each core of a tensor train."""
    count = (len(ranks) + 1) // 3
    first, second = ranks[:count], ranks[count : 2 * count]
    edges = (1, *ranks[2 * count :], 1)
    rests = [math.prod(first[at + 1 :]) * math.prod(second[:at]) for at in range(count)]
    return [
        (edges[at] * first[at], edges[at + 1] * second[at], rest) for at, rest in enumerate(rests)
    ]


def _low_rank(layer: nn.Module, ranks: Ranks) -> list[nn.Module]:
    outputs, inputs, *_ = sizes_of(layer)
    if kind_of(layer) in LINEAR:
        return [_linear(inputs, ranks[0]), _linear(ranks[0], outputs)]
    return [_like(layer, inputs, ranks[0]), _pointwise(layer, ranks[0], outputs)]


def _tucker(layer: nn.Module, ranks: Ranks) -> list[nn.Module]:
    outputs, inputs, *_ = sizes_of(layer)
    return [
        _pointwise(layer, inputs, ranks[0]),
        _like(layer, *ranks),
        _pointwise(layer, ranks[1], outputs),
    ]


def _cp(layer: nn.Module, ranks: Ranks) -> list[nn.Module]:
    outputs, inputs, *kernel = sizes_of(layer)
    return [
        _pointwise(layer, inputs, ranks[0]),
        *(_like(layer, ranks[0], ranks[0], along=at) for at in range(len(kernel))),
        _pointwise(layer, ranks[0], outputs),
    ]


def _tensor_train(layer: nn.Module, ranks: Ranks) -> list[nn.Module]:
    outputs, inputs = sizes_of(layer)
    nexts = (*ranks[2 * (len(ranks) + 1) // 3 :], 1)
    cores = [
        Core(_linear(a, b), rank, (inputs, outputs))
        for (a, b, _), rank in zip(_cores(ranks), nexts, strict=True)
    ]
    return [*cores, Shift(outputs)]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, device="meta")


def _pointwise(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    return CONVOLUTIONS[kind_of(layer)](inputs, outputs, 1, bias=False, device="meta")


def _like(layer: nn.Module, inputs: int, outputs: int, along: int | None = None) -> nn.Module:
    """With a layer's own kernel; or what it does along one dimension, to each channel alone."""
    settings: dict[str, Any] = {"padding_mode": layer.padding_mode}
    for name, other in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        value = cast("Any", getattr(layer, name))
        if along is not None and not isinstance(value, str):
            value = tuple(v if at == along else other for at, v in enumerate(value))
        settings[name] = value
    if along is not None:
        settings["groups"] = outputs
    return CONVOLUTIONS[kind_of(layer)](inputs, outputs, bias=False, device="meta", **settings)


MAKERS: dict[str, Callable[[nn.Module, Ranks], list[nn.Module]]] = {
    "low_rank": _low_rank,
    "tucker": _tucker,
    "cp": _cp,
    "tensor_train": _tensor_train,
}
"""Links on the meta device, without a bias."""
