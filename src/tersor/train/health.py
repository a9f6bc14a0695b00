"""What tells that a training has failed: it is stopped in the step where that shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.train.regime import Regime

_FIRST = 10
"""Steps whose losses say what is usual."""
_EXPLODED = 1e4
"""A loss so many times the largest of those, or of 1, comes back no more."""
_NOTHING = 1e-7
_DEAD = 20
"""Steps without any gradient, in a row."""
_LOOKS = 10
"""Steps from one look at what is bounded to the next."""
_SMALLEST_SCALE = 2.0**-14
"""Of a loss in float16; gradients that overflow even so are no matter of scale."""
_BACK = "the network is as it was at its best before"


class Bounded(Regime):
    """Stops a training in which a number that says how large others are has run away.

    numbers: tensors of them by the names that an error gives them

    Raises ModelError in `after` for one that is not finite, or 10,000 times as large as at first.
    """

    def __init__(self, numbers: Mapping[str, Callable[[], Tensor]]) -> None:
        """Looks at all of them every ten steps."""
        self._numbers = numbers

    def begin(self, model: nn.Module, steps: int) -> None:
        """Notes how large they are; where a training is resumed, as it began."""
        self._steps = steps
        self._first = {name: _largest(number()) for name, number in self._numbers.items()}

    def after(self, step: int) -> None:
        """Looks at them now and then."""
        if (step + 1) % _LOOKS and step + 1 != self._steps:
            return
        for name, number in self._numbers.items():
            size, first = _largest(number()), self._first[name]
            if not math.isfinite(size) or size > _EXPLODED * max(first, _NOTHING):
                raise ModelError(
                    f"training stopped in step {step + 1} of {self._steps}: {name} is {size:.3g} "
                    f"and began at {first:.3g}; {_BACK}. Use a longer warm-up or a smaller clip "
                    "(training={'warmup': 0.2, 'clip': 0.1}), or more bits"
                )

    def state(self) -> dict[str, Any]:
        """Sizes at the start."""
        return {"first": self._first}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._first = state["first"]


@torch.no_grad()
def _largest(number: Tensor) -> float:
    return float(number.abs().max())


class Alive(Regime):
    """Stops a training that has come to one and the same answer for all rows of every batch.

    `look` is called with what the network says. Raises ModelError in `gradients`, behind the
    twentieth batch in a row for whose rows different answers were wanted.
    """

    def __init__(self) -> None:
        self._steps = self._in_a_row = 0

    def begin(self, model: nn.Module, steps: int) -> None:
        """For the error."""
        self._steps = steps

    def look(self, outputs: Tensor, wanted: Tensor | None) -> None:
        """outputs: (rows, ...). wanted: (rows, ...) labels or answers, None where not known"""
        alike = _alike(outputs) and not (wanted is None or _alike(wanted))
        self._in_a_row = self._in_a_row + 1 if alike else 0

    def gradients(self, step: int) -> None:
        """Looks whether it was too often."""
        if self._in_a_row >= _DEAD:
            raise ModelError(
                f"training stopped in step {step + 1} of {self._steps}: for {self._in_a_row} "
                "batches the network has given the same answer to all of their rows, so no input "
                f"reaches its end; {_BACK}. Use a lower rate, ask for more bits or less sparsity, "
                "or look for layers whose outputs are all zero"
            )

    def state(self) -> dict[str, Any]:
        """How often so far."""
        return {"in_a_row": self._in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._in_a_row = state["in_a_row"]


def _alike(rows: Tensor) -> bool:
    return bool((rows[1:] == rows[:1]).all()) if len(rows) > 1 else False


class Health:
    """Watches losses and gradients. Raises ModelError with the step, the value and a way out."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._usual = 1.0
        self._dead = 0

    def check_loss(self, loss: float, step: int) -> None:
        """Of one batch."""
        self.check_finite(loss, step)
        # How large the first one is may be a matter of units.
        if step and abs(loss) > _EXPLODED * self._usual:
            raise self._error(
                step,
                f"the loss is {loss:.3g}, and was at most {self._usual:.3g} in the first steps",
                "Use a lower rate, or a longer warm-up (training={'warmup': 0.2})",
            )
        if step < _FIRST:
            self._usual = max(self._usual, abs(loss))

    def check_finite(self, loss: float, step: int) -> None:
        """Of a batch, or a penalty."""
        if not math.isfinite(loss):
            raise self._error(step, f"the loss is {loss}", "Ask for more bits or a lower rate")

    def check_judged(self, found: float, step: int, before: Sequence[float]) -> None:
        """What a state was judged at. before: what earlier ones were"""
        # Where it never was finite, training may yet make it so.
        if math.isnan(found) or (math.isinf(found) and any(map(math.isfinite, before))):
            what = "NaN" if math.isnan(found) else "answers that are infinitely far off"
            raise self._error(step, f"held-out inputs give {what}", "Use a lower rate")

    def check_slope(self, loss: Tensor, step: int) -> None:
        """Whether the loss depends on anything."""
        if not loss.requires_grad:
            raise self._error(
                step,
                "its loss depends on no weight",
                "Look for detach() and no_grad() in the forward pass",
            )

    def may_step(self, length: float, loss: float, step: int, scaler: Any) -> bool:
        """False for a step to be left out, since gradients overflow at the scaler's scale.

        length: of all gradients together, before it is clipped
        """
        if not math.isfinite(length):
            if scaler.is_enabled() and scaler.get_scale() > _SMALLEST_SCALE:
                return False
            raise self._error(
                step, f"the length of the gradient is {length}", "Ask for more bits or a lower rate"
            )
        # A student that answers as its teacher has nothing to learn, and is not dead.
        self._dead = self._dead + 1 if length == 0 and abs(loss) > _NOTHING else 0
        if self._dead == _DEAD:
            raise self._error(
                step,
                f"no gradient has reached the network for {_DEAD} steps",
                "Use a lower rate, or look for layers whose outputs are all zero",
            )
        return True

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"usual": self._usual, "dead": self._dead}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._usual, self._dead = state["usual"], state["dead"]

    def _error(self, step: int, what: str, way_out: str) -> ModelError:
        return ModelError(
            f"training stopped in step {step + 1} of {self._steps}: {what}; {_BACK}. {way_out}, or "
            "look for inputs that bring it about"
        )
