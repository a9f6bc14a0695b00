"""Stored float tensors that are trained: kept wide while they learn, read as they will be stored.

Inside `shown`, a layer or a form reads the rounded value in place of the stored one, so what is
trained is what is stored. Gradients pass the rounding unchanged (straight through).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from tersor.forms.form import Form
from tersor.forms.trellis import Trellis, narrowest

Owner = tuple[nn.Module, str]


class Trained(Protocol):
    """Something stored that is trained.

    change: what is trained; 0 at the start
    """

    change: nn.Parameter

    def show(self) -> None:
        """Lets every place read the value as it is now."""

    def hide(self) -> None:
        """Lets every place read the stored value again."""

    def store(self) -> None:
        """Makes the value the stored one."""


class Tuned:
    """One tensor, with every place that reads it.

    A positive one, as scales are, moves by factors and stays positive; another moves by its own
    size, the root of its mean square. So one rate suits all.
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
        """See `Trained`."""
        value = self.value()
        for owner, name in self.uses:
            # Forms give weights of their own type; a layer computes in that of what it stores.
            read = value if isinstance(owner, Form) else value.to(self._stored.dtype)
            # An instance's own attribute comes before its tables of parameters and buffers.
            owner.__dict__[name] = read

    def hide(self) -> None:
        """See `Trained`."""
        for owner, name in self.uses:
            owner.__dict__.pop(name, None)

    def store(self) -> None:
        """See `Trained`."""
        with torch.no_grad():
            self._stored.copy_(self.value())


class TunedNumbers:
    """A vector on a plain grid, such as a bias after `quantize.entropy`: its codes are trained.

    It moves by its own size and is rounded to whole steps; the step stays.
    """

    def __init__(self, form: Trellis) -> None:
        """form: of one state"""
        self._form = form
        self._start = form.dense().detach().float()
        self._size = float(self._start.square().mean().sqrt()) or float(form.step.mean())
        self.change = nn.Parameter(torch.zeros_like(self._start))

    def codes(self) -> Tensor:
        """In the layout and of the type of the form's."""
        levels = (self._start + self._size * self.change).detach()
        return narrowest((levels.reshape(self._form.codes.shape) / self._form.step).round())

    def show(self) -> None:
        """See `Trained`."""
        form = self._form
        rounded = (self.codes() * form.step).reshape(form.shape)
        moved = self._size * self.change
        form._decoded = (rounded + (moved - moved.detach())).to(form.dtype)

    def hide(self) -> None:
        """See `Trained`."""
        self._form._decoded = None

    def store(self) -> None:
        """See `Trained`."""
        self._form.codes = self.codes().contiguous()


@contextmanager
def shown(tuned: Sequence[Trained]) -> Iterator[None]:
    """Inside the block the network computes with the values as they were at its start."""
    try:
        for each in tuned:
            each.show()
        yield
    finally:
        for each in tuned:
            each.hide()
