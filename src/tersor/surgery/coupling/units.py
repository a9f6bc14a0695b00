"""Units: what of a network can only be kept or removed whole, such as one channel or one head."""

from __future__ import annotations

from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]
"""Units by their numbers."""


class Units:
    """Numbers that can be united, and those that must stay, with the reason."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._stays: dict[int, str] = {}
        self._mixed: list[Ids] = []

    def new(self, count: int) -> Ids:
        """As many units as asked for."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, unit: int) -> int:
        """The number by which all united ones go."""
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit

    def roots(self, ids: Ids) -> Ids:
        """The same for many."""
        values, places = np.unique(ids, return_inverse=True)
        found: Ids = np.array([self.root(int(v)) for v in values], dtype=np.int64)
        return found[places].reshape(ids.shape)

    def unite(self, first: Ids, second: Ids) -> None:
        """Place by place; shapes that fit each other."""
        one, other = np.broadcast_arrays(first, second)
        for a, b in zip(one.ravel().tolist(), other.ravel().tolist(), strict=True):
            self._unite(a, b)

    def together(self, ids: Ids, axis: int) -> None:
        """All along one axis."""
        moved = np.moveaxis(ids, axis, 0)
        for other in moved[1:]:
            self.unite(moved[0], other)

    def keep(self, ids: Ids, reason: str) -> None:
        """These must stay. The first reason counts."""
        for unit in np.unique(ids).tolist():
            self._stays.setdefault(self.root(unit), reason)

    def mix(self, ids: Ids) -> None:
        """A statistic goes over these: without some of them, the others are seen differently."""
        self._mixed.append(ids)

    def mixed(self) -> set[int]:
        """All of which that is so."""
        return {int(root) for ids in self._mixed for root in self.roots(ids).ravel()}

    def stays(self, unit: int) -> str | None:
        """Why it must stay, None where it need not."""
        return self._stays.get(self.root(unit))

    def _unite(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        low, high = min(a, b), max(a, b)
        self._parent[high] = low
        if high in self._stays:
            self._stays.setdefault(low, self._stays.pop(high))
