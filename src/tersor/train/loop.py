"""The training loop. The best state is kept, and a kill loses a few minutes at most.

Sources: see `training`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import ModelError, OptionError, TaskError
from tersor.train.health import Health
from tersor.train.lessons import Lesson, Lessons
from tersor.train.log import Curve, TrainingLog
from tersor.train.memory import fingerprint
from tersor.train.regime import Regime
from tersor.train.states import Average, Snapshot, put, statistics
from tersor.train.training import Training


@dataclass(frozen=True)
class Fitted:
    """What training came to.

    before, after: what `judge` said at the start, and of the state that was kept
    steps: of the optimizer
    epoch: after which the kept state stood, 0 for the start
    curve: losses, and the judge's word by epoch
    """

    before: float
    after: float
    steps: int
    epoch: int
    curve: Curve


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lessons: Lessons,
    loss: Callable[[Lesson], Tensor],
    *,
    epochs: int,
    judge: Callable[[], float] | None,
    generator: torch.Generator,
    training: Training | Mapping[str, Any] | None = None,
    regimes: Sequence[Regime] = (),
    log: TrainingLog | None = None,
) -> Fitted:
    """Trains what `optimizer` holds, in place, and leaves the state that `judge` found best.

    The rates that the optimizer was made with are the highest. The start counts as a state too,
    unless a regime has yet to do its work; where one never has done it, the last state is left.

    loss: of one batch; may differ from `lessons.loss`, where something is to be done before
    judge: called before the first epoch and after each; the lower the better. With None the last
        state is the best
    generator: draws the order of the batches
    training: schedule, averages, precision and the like
    regimes: what happens beside the lessons
    log: where it shows itself, and is kept; it goes on from what is kept there. Bit by bit as if
        never killed, if batches depend on `generator` and torch's own random numbers alone

    Raises TaskError without batches, ModelError where training fails: a loss or a gradient that is
    not finite, a loss that explodes, gradients that are gone. The best state so far is back then,
    as it is after whatever else stops the training.
    """
    if not len(lessons):
        raise TaskError("there are no batches to train on; give the task train=(inputs, targets)")
    run = _Run(
        model, optimizer, lessons, loss, epochs, judge, generator, Training.of(training), regimes,
        log or TrainingLog(show=False),
    )  # fmt: skip
    try:
        run.start()
        run.train()
    except ModelError:
        # What was kept leads to the same failure.
        run.log.forget()
        raise
    finally:
        run.kept.restore()
    curve = run.curve
    curve.kept = run.best_epoch
    return Fitted(*curve.bounds(), run.step, run.best_epoch, curve)


@dataclass
class _Run:
    """One training. Everything below `log` is what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lessons: Lessons
    loss: Callable[[Lesson], Tensor]
    epochs: int
    judge: Callable[[], float] | None
    generator: torch.Generator
    settings: Training
    regimes: Sequence[Regime]
    log: TrainingLog
    epoch: int = 0
    batches: int = 0
    step: int = 0
    best: float = math.inf
    best_epoch: int = 0
    curve: Curve = field(default_factory=Curve)

    def __post_init__(self) -> None:
        """What is trained, and how it is now."""
        per_epoch = -(-len(self.lessons) // self.settings.accumulate)
        self.steps = self.epochs * per_epoch
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.tensors = [*self.trained, *statistics(self.model)]
        self.kept = Snapshot(self.tensors)
        decay = self.settings.ema
        self.average = None if decay is None else Average(self.tensors, decay)
        device = self.trained[0].device.type
        half = self.settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(device, enabled=half)
        self.health = Health(self.steps)
        # How random numbers stood at the start of an epoch that is under way: those of the order
        # of batches, and torch's own.
        self.random: list[Any] | None = None
        self.counted = False

    def start(self) -> None:
        """At the beginning, or where a checkpoint says."""
        self.about = self._about() if self.log.path is not None else ""
        for regime in self.regimes:
            regime.begin(self.model, self.steps)
        if (state := self._last()) is not None:
            self._restore(state)
        else:
            self._judge()

    def train(self) -> None:
        """All that is left."""
        with self.log.bar(self.steps, self.step) as bar:
            while self.epoch < self.epochs and not self._stale():
                for group in self._groups():
                    value = self._step(group)
                    self.curve.add(value)
                    bar.step(value)
                    self.batches += len(group)
                    if self._due():
                        self._store()
                self.epoch += 1
                self.batches, self.random = 0, None
                self._judge()
                self._store()

    def _due(self) -> bool:
        """Whether to keep a checkpoint between two steps."""
        due = self.log.due()
        for regime in self.regimes if self.log.path is not None else ():
            due = regime.due(due)
        return due

    def _store(self) -> None:
        together = not all(regime.alone for regime in self.regimes)
        self.log.store(self._state(), spare=together)

    def _last(self) -> dict[str, Any] | None:
        """The last checkpoint; where other processes take part, the last one of all of them."""
        kept = self.log.read()
        known = {self._place(state): state for state in reversed(kept)}
        places: Sequence[int] | None = None if self.log.path is None else list(known)[::-1]
        for regime in self.regimes:
            places = regime.common(places)
        return known[places[0]] if places else None

    def _place(self, state: dict[str, Any]) -> int:
        """Where a checkpoint stands: behind an epoch is later than behind its last batch."""
        try:
            epoch, batches = state["at"][:2]
            return int(epoch * (len(self.lessons) + 1) + batches)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> OptionError:
        return OptionError(
            f"{self.log.path} is damaged ({type(error).__name__}: {error}); delete it to start anew"
        )

    def _groups(self) -> Iterator[list[Lesson]]:
        """The batches of each step of this epoch, without those that a checkpoint has seen."""
        if self.random is None:
            self.random = [self.generator.get_state(), self._numbers()]
            lessons = self.lessons.epoch(self.generator)
        else:
            now = self._numbers()
            self.generator.set_state(self.random[0])
            self._set_numbers(self.random[1])
            lessons = self.lessons.epoch(self.generator, self.batches)
            self._set_numbers(now)
        while True:
            # A teacher is asked on the way, as precisely as its student computes.
            with self._precision():
                group = list(itertools.islice(lessons, self.settings.accumulate))
            if not group:
                return
            yield group

    def _step(self, group: Sequence[Lesson]) -> float:
        """One step of the optimizer. Returns the loss."""
        share = self.settings.rate(self.step, self.steps)
        for settings, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            settings["lr"] = rate * share
        self.optimizer.zero_grad()
        total = 0.0
        for lesson in group:
            with torch.enable_grad(), self._precision():
                value = self.loss(lesson) / len(group)
            self.health.check_slope(value, self.step)
            total += float(value.detach())
            self.health.check_loss(total, self.step)
            self.scaler.scale(value).backward()  # type: ignore[no-untyped-call]
        self._penalize()
        self.scaler.unscale_(self.optimizer)
        for regime in self.regimes:
            regime.gradients(self.step)
        length = nn.utils.clip_grad_norm_(self.trained, self.settings.clip)
        if self.health.may_step(float(length), total, self.step, self.scaler):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.scaler.update(self.scaler.get_scale() / 2)
        for regime in self.regimes:
            regime.after(self.step)
        if self.average is not None:
            self.average.add()
        self.step += 1
        return total

    def _penalize(self) -> None:
        for regime in self.regimes:
            with torch.enable_grad():
                penalty = regime.penalty(self.step)
            if penalty is not None:
                self.health.check_finite(float(penalty.detach()), self.step)
                self.scaler.scale(penalty).backward()  # type: ignore[no-untyped-call]

    def _precision(self) -> Any:
        """Inside, products are in few bits if that was asked for."""
        if self.settings.precision == "float32":
            return nullcontext()
        dtype = getattr(torch, self.settings.precision)
        return torch.autocast(self.trained[0].device.type, dtype)

    def _judge(self) -> None:
        """Keeps this state if it is the best so far."""
        with nullcontext() if self.average is None else self.average.shown():
            for regime in self.regimes:
                regime.enforce()
            found = math.nan if self.judge is None else self.judge()
            if self.judge is not None:
                self.health.check_judged(found, self.step)
                self.curve.judged.append(found)
            better = self.judge is None or found < self.best
            if not self.counted or (self.settled and better):
                self.best, self.best_epoch = found, self.epoch
                self.counted = self.settled
                self.kept.note()

    def _stale(self) -> bool:
        patience = self.settings.patience
        late = (
            patience is not None
            and self.judge is not None
            and self.epoch - self.best_epoch >= patience
        )
        return late and self.settled

    @property
    def settled(self) -> bool:
        """Whether all regimes are."""
        return all(regime.settled for regime in self.regimes)

    def _about(self) -> str:
        """What tells this training from others: its settings, its data, the network's start."""
        digest = hashlib.sha256()
        plain = (int, float, str, bool, type(None))
        # Of lessons that are a part of others, those.
        lessons = getattr(self.lessons, "lessons", self.lessons)
        teacher = getattr(lessons, "original", None)
        parts = [self.lessons, lessons, *self.regimes]
        known = [
            {k: v for k, v in vars(part).items() if k != "_count" and isinstance(v, plain)}
            for part in parts
        ]
        groups = [
            {k: v for k, v in group.items() if isinstance(v, plain)}
            for group in self.optimizer.param_groups
        ]
        said = [
            self.log.name,
            self.log.about,
            self.settings,
            self.epochs,
            self.steps,
            known,
            groups,
        ]
        digest.update(repr([*said, type(self.optimizer).__name__]).encode())
        task = self.lessons.task
        known_by = task.fingerprint() if teacher is None else fingerprint(teacher, task)
        digest.update(known_by.encode())
        digest.update(self.generator.get_state().numpy().tobytes())
        for tensor in (*self.tensors, *self.model.state_dict().values()):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy())
        return digest.hexdigest()

    def _numbers(self) -> list[Tensor]:
        """Torch's own random numbers, with those of the device."""
        device = self.trained[0].device
        more = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *more]

    def _set_numbers(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self.trained[0].device)

    def _state(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "at": [self.epoch, self.batches, self.step, self.best, self.best_epoch, self.counted],
            "curve": self.curve.state(),
            "tensors": self.tensors,
            "kept": self.kept.values,
            "average": None if self.average is None else self.average.state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "health": self.health.state(),
            "regimes": [regime.state() for regime in self.regimes],
            "generator": self.generator.get_state(),
            "random": self._numbers(),
            "epoch_random": self.random,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state.get("about") != self.about:
            raise OptionError(
                f"{self.log.path} holds another training: options, data or the network's start "
                "are not what they were; delete it to start anew, or name another folder"
            )
        try:
            self._take(state)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._damaged(error) from error
        if not all(t.isfinite().all() for t in self.tensors if t.is_floating_point()):
            raise OptionError(f"{self.log.path} holds NaN; delete it to start anew")

    def _take(self, state: dict[str, Any]) -> None:
        at = state["at"]
        self.epoch, self.batches, self.step, self.best, self.best_epoch, self.counted = at
        self.curve = Curve.of(state["curve"])
        put(self.tensors, state["tensors"])
        self.kept.values = [
            value.to(tensor.device)
            for value, tensor in zip(state["kept"], self.tensors, strict=True)
        ]
        if self.average is not None:
            self.average.restore(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.health.restore(state["health"])
        for regime, kept in zip(self.regimes, state["regimes"], strict=True):
            regime.restore(kept)
        self.generator.set_state(state["generator"])
        self._set_numbers(state["random"])
        self.random = state["epoch_random"]
