"""The one interface of all ways to average gradients, and the plainest of them.

Source: Karimireddy, Rebjock, Stich, Jaggi 2019, arXiv:1901.09847, algorithm 2, for error feedback:
what was not sent is kept, and added to the next gradient.
Differs from the paper: errors are those of gradients and not of gradients times rate, so that any
optimizer may follow (as in algorithm 2 of PowerSGD).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.train.distributed.exchange import Talk, mean


class Compressor:
    """One worker's way of averaging gradients. Every worker has one of its own, made alike.

    feedback: keep what was not sent, and add it to the next gradient; without it, it is lost
    kept: what has not been sent so far, float32, one tensor for each gradient; empty before the
        first step
    momentum: that it brings itself; the optimizer behind it must have none then
    """

    momentum = 0.0

    def __init__(self, *, feedback: bool = True) -> None:
        self.feedback = feedback
        self.kept: list[Tensor] = []
        self._shapes: list[tuple[int, ...]] = []

    def __repr__(self) -> str:
        """Its kind and settings, without how far it is."""
        settings = {name.lstrip("_"): value for name, value in vars(self).items()}
        said = [
            f"{name}={value!r}"
            for name, value in settings.items()
            if name not in self.state() and isinstance(value, int | float | str | None)
        ]
        return f"{type(self).__name__}({', '.join(said)})"

    def average(self, gradients: Sequence[Tensor]) -> Talk[list[Tensor]]:
        """Means over workers of what they sent, of the gradients' shapes and types.

        With feedback, on each worker: sent + kept = gradient + kept before. Where a gradient is not
        finite, the means are not either on every worker, and nothing is kept of the step: it is to
        be left out, as after an overflow in float16.

        gradients: of the same parameters in the same order at every step and on every worker.
            Raises OptionError otherwise, and for sparse tensors
        """
        self._check(gradients)
        own, before = [gradient.detach().float() for gradient in gradients], self.state()
        if not _finite(own):
            # Wherever it is, every worker must come to know of it.
            own = [torch.full_like(gradient, torch.nan) for gradient in own]
        wanted = self._wanted(own)
        sent, averaged = yield from self._exchange(wanted)
        self._keep(wanted, sent)
        if not _finite(averaged):
            self.restore(before)
        return [part.to(old.dtype) for part, old in zip(averaged, gradients, strict=True)]

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here; differs between workers."""
        return {"kept": self.kept, "shapes": [list(shape) for shape in self._shapes]}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`. Tensors move to the device of the next gradients."""
        self.kept = list(state["kept"])
        self._shapes = [tuple(shape) for shape in state["shapes"]]

    def _wanted(self, gradients: list[Tensor]) -> list[Tensor]:
        """What would be sent if bytes were free."""
        if not self.kept:
            return gradients
        return [
            gradient + kept.to(gradient.device)
            for gradient, kept in zip(gradients, self.kept, strict=True)
        ]

    def _exchange(self, wanted: list[Tensor]) -> Talk[tuple[list[Tensor], list[Tensor]]]:
        """What this worker sent, as others understand it, and the mean over workers of that."""
        raise NotImplementedError

    def _keep(self, wanted: list[Tensor], sent: list[Tensor]) -> None:
        if self.feedback:
            self.kept = [whole - part for whole, part in zip(wanted, sent, strict=True)]

    def _check(self, gradients: Sequence[Tensor]) -> None:
        shapes = [tuple(gradient.shape) for gradient in gradients]
        if not shapes:
            raise OptionError("gradients=[]: there must be at least one; unfreeze some parameters")
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            raise OptionError(
                f"gradients: {len(shapes)} tensors of shapes {_few(shapes)}, where the step before "
                f"had {len(self._shapes)} of shapes {_few(self._shapes)}; they must be the same at "
                "every step: make a new compressor for other parameters"
            )
        if any(gradient.is_sparse for gradient in gradients):
            raise OptionError(
                "gradients: a sparse tensor cannot be compressed; make the embedding with "
                "sparse=False"
            )


class Uncompressed(Compressor):
    """Every value as float32: the exact mean, to compare with."""

    def __init__(self) -> None:
        super().__init__(feedback=False)

    def _exchange(self, wanted: list[Tensor]) -> Talk[tuple[list[Tensor], list[Tensor]]]:
        return wanted, (yield from mean(wanted))


def check_share(share: float) -> float:
    """`share` when it is above 0 and at most 1. Raises OptionError otherwise."""
    if not 0 < share <= 1:
        raise OptionError(
            f"share={share!r} must be above 0 and at most 1: the part of all values that is sent; "
            "0.01 sends one of a hundred"
        )
    return share


def mean_of(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Means over workers of their tensors, added in the order of workers, so alike on each."""
    return [torch.stack(list(column)).mean(0) for column in zip(*parts, strict=True)]


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _few(shapes: Sequence[tuple[int, ...]]) -> str:
    shown = ", ".join(str(shape) for shape in shapes[:3])
    return f"{shown}, ..." if len(shapes) > 3 else shown
