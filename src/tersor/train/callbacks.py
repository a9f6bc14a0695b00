"""Regimes in loops that are not tersor's: Lightning's `Trainer`, and that of Hugging Face.

The network keeps its own loop, optimizer, precision and logging; a regime's masks, penalties and
exchanged gradients happen beside it. Penalties reach the weights by gradients of their own, so they
do not show in the loss that such a loop logs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tersor.errors import MissingExtra, OptionError
from tersor.train.health import Health
from tersor.train.regime import Regime


class Beside:
    """What a callback does, whoever calls it: once a step of the optimizer, in this order."""

    def __init__(self, regimes: Sequence[Regime]) -> None:
        """Raises OptionError without any."""
        if not regimes:
            raise OptionError("a callback without regimes does nothing; give it one")
        self._regimes = regimes
        self.step = 0

    def begin(self, model: nn.Module, steps: int) -> None:
        """Raises OptionError where the loop does not know how long it will be."""
        if steps < 1 or steps == float("inf"):
            raise OptionError(
                f"the loop says that it takes {steps} steps; give it a number of epochs or steps, "
                "which regimes plan by"
            )
        self.step, self._steps, self._health = 0, int(steps), Health(int(steps))
        for regime in self._regimes:
            regime.begin(model, int(steps))

    def gradients(self) -> None:
        """Behind the backward pass; in transformers gradients are clipped already."""
        for regime in self._regimes:
            with torch.enable_grad():
                penalty = regime.penalty(self.step)
            if penalty is not None:
                self._health.check_loss(float(penalty.detach()), self.step)
                penalty.backward()  # type: ignore[no-untyped-call]
        for regime in self._regimes:
            regime.gradients(self.step)

    def after(self) -> None:
        """Behind the optimizer's step."""
        for regime in self._regimes:
            regime.after(self.step)
        self.step += 1

    def finish(self) -> None:
        """Behind the last step, or where the loop stopped: what there is then is stored.

        Warns of steps that are missing to what a regime was to do; of a goal that was missed with
        all steps done, the regime itself warns.
        """
        for regime in self._regimes:
            regime.enforce()
        if self.step < self._steps and not all(regime.settled for regime in self._regimes):
            warnings.warn(
                f"the loop ended after {self.step} of {self._steps} steps, before what it was to "
                "do was done; the network is stored as it was then",
                stacklevel=2,
            )
        for regime in self._regimes:
            regime.finish()

    def state(self) -> dict[str, Any]:
        """For the loop's own checkpoints."""
        return {"step": self.step, "regimes": [regime.state() for regime in self._regimes]}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, behind `begin`."""
        self.step = state["step"]
        for regime, kept in zip(self._regimes, state["regimes"], strict=True):
            regime.restore(kept)


def lightning_callback(*regimes: Regime) -> Any:
    """A callback for Lightning: `Trainer(callbacks=[lightning_callback(regime)])`.

    Its checkpoints hold how far the regimes are. Raises MissingExtra without Lightning.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        raise MissingExtra("lightning", "lightning") from None
    beside = Beside(regimes)

    class Compressing(Callback):  # type: ignore[misc]
        """Calls the regimes."""

        _kept: dict[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            beside.begin(pl_module, trainer.estimated_stepping_batches)
            if self._kept is not None:
                beside.restore(self._kept)

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            beside.gradients()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            # Not where gradients are still accumulated.
            if trainer.global_step > beside.step:
                beside.after()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            beside.finish()

        def state_dict(self) -> dict[str, Any]:
            return beside.state()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._kept = state_dict

    return Compressing()


def trainer_callback(*regimes: Regime) -> Any:
    """A callback for transformers: `Trainer(callbacks=[trainer_callback(regime)])`.

    Raises MissingExtra without transformers.
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise MissingExtra("hf", "transformers") from None
    beside = Beside(regimes)

    class Compressing(TrainerCallback):  # type: ignore[misc]
        """Calls the regimes."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step:
                raise OptionError(
                    f"the Trainer goes on at step {state.global_step}, and its checkpoints do not "
                    "hold how far regimes were; start it anew"
                )
            beside.begin(given["model"], state.max_steps)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            beside.gradients()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            beside.after()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            beside.finish()

    return Compressing()
