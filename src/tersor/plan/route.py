"""A route: how weights are stored, as a curve from bytes to recipes that a search can walk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """A recipe that could be tried.

    spent: bytes that the weights are expected to take
    expected: the divergence it is expected to cause, None where none was measured beforehand
    labels: weight -> the choice it gets
    """

    recipe: Rows
    spent: int = 0
    expected: float | None = None
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """Plans by the bytes that they spend on weights; more bytes lose less.

    propose: the plan for at most so many bytes, from `least` to `most`
    least: fewest bytes that there is a plan for
    ample: bytes at which hardly any network loses anything
    most: bytes of weights that are left unchanged
    sensitivity: for the compressed model, the rows of the report that say how far the outputs move
        when one weight alone is stored another way
    """

    propose: Callable[[int], Plan]
    least: int
    ample: int
    most: int
    sensitivity: Callable[[nn.Module], Rows]
