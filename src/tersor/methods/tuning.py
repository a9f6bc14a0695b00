"""Stored float tensors that are trained: kept wide while they learn, read as they will be stored.

Inside `shown`, a layer or a form reads the rounded value in place of the stored one, so what is
trained is what is stored. Gradients pass the rounding unchanged (straight through).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Owner = tuple[nn.Module, str]


class Tuned:
    """One tensor, with every place that reads it.

    A positive one, as scales are, moves by factors and stays positive; another moves by its own
    size, the root of its mean square. So one rate suits all.

    change: what is trained; 0 at the start
    """

    def __init__(self, uses: Sequence[Owner], *, keep_zeros: bool = False) -> None:
        """keep_zeros: elements that are 0 stay 0."""
        self.uses = uses
        self._stored: Tensor = getattr(*uses[0])
        self._start = self._stored.detach().float()
        self._positive = bool((self._start > 0).all())
        size = float(self._start.square().mean().sqrt()) or 1.0
        self._unit = torch.full_like(self._start, size)
        if keep_zeros:
            self._unit[self._start == 0] = 0
        self.change = nn.Parameter(torch.zeros_like(self._start))

    def value(self) -> Tensor:
        """float32, with values of the stored type."""
        moved: Tensor = (
            self._start * self.change.exp()
            if self._positive
            else self._start + self._unit * self.change
        )
        rounded = moved.detach().to(self._stored.dtype).float()
        return rounded + (moved - moved.detach())

    def show(self) -> None:
        """Lets every place read the value as it is now."""
        value = self.value()
        for layer, name in self.uses:
            # An instance's own attribute comes before its tables of parameters and buffers.
            layer.__dict__[name] = value

    def hide(self) -> None:
        """Lets every place read the stored tensor again."""
        for layer, name in self.uses:
            layer.__dict__.pop(name, None)

    def store(self) -> None:
        """Makes the value the stored one."""
        with torch.no_grad():
            self._stored.copy_(self.value())


@contextmanager
def shown(tuned: Sequence[Tuned]) -> Iterator[None]:
    """Inside the block the network computes with the values as they were at its start."""
    try:
        for each in tuned:
            each.show()
        yield
    finally:
        for each in tuned:
            each.hide()
