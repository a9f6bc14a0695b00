"""What may happen in training beside the lessons: masks, penalties, exchanged gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Regime:
    """Does nothing; a regime overrides what it needs. `fit` and the callbacks call it in turn.

    alone: whether no other process takes part
    paced: whether what it does follows a plan over all steps, which then have to come
    apart: whether other processes have other weights between its exchanges
    chooses: whether it chooses by the weights, which have to be the same on all processes then
    own: parameters that it trains itself

    Its work may stretch over the whole training, as that of a mask that grows: no state counts as
    the result before `settled`.
    """

    alone = True
    paced = False
    apart = False
    chooses = False
    own: Sequence[nn.Parameter] = ()

    def begin(self, model: nn.Module, steps: int) -> None:
        """Before the first step of `steps`; also of a training that is about to be resumed."""

    def penalty(self, step: int) -> Tensor | None:
        """What is added to the loss of `step`, counted from 0."""
        return None

    def gradients(self, step: int) -> None:
        """Behind the backward pass, before gradients are clipped."""

    def after(self, step: int) -> None:
        """Behind the optimizer's step."""

    def enforce(self) -> None:
        """Puts into the weights what must hold for them: they may just have been averaged."""

    @property
    def settled(self) -> bool:
        """Whether what the network is now may be the result."""
        return True

    @property
    def leapt(self) -> bool:
        """Whether weights were just given other values, which no average with older ones fits."""
        return False

    def due(self, due: bool) -> bool:
        """Whether to keep a checkpoint behind this step. due: what this process's clock says"""
        return due

    def common(self, places: Sequence[int] | None) -> Sequence[int] | None:
        """Those of the places where kept checkpoints stand that the training may go on from.

        places: the newest first; None where none are kept at all
        """
        return places

    def finish(self) -> None:
        """Behind the last step in another loop: what is stored takes the place of what was trained.

        `fit` leaves that to the technique.
        """

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and names that `restore` needs to go on from here."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; called behind `begin`."""
