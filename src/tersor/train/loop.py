"""The training loop. The best state is kept, and a kill loses a few minutes at most.

Sources: see `training`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import ModelError, OptionError, TaskError
from tersor.train.health import Health
from tersor.train.lessons import Lesson, Lessons
from tersor.train.log import Curve, TrainingLog
from tersor.train.regime import Regime
from tersor.train.resuming import identity_of, last_kept, resume, state_of
from tersor.train.states import (
    Average,
    Snapshot,
    plain_state,
    random_numbers,
    set_random_numbers,
    statistics,
)
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

    Raises TaskError without batches, and for fewer than a regime was told that follows a plan over
    all of them; OptionError for `ema` where weights differ between processes; ModelError where
    training fails: a loss or a gradient that is not finite, a loss that explodes, gradients that
    are gone, held-out answers that come to be none. The best state so far is back then, as it is
    after whatever else stops the training; behind a ModelError a log with a folder keeps it there
    too.
    """
    if not len(lessons):
        raise TaskError("there are no batches to train on; give the task train=(inputs, targets)")
    settings = Training.of(training)
    if settings.ema is not None and any(regime.apart for regime in regimes):
        raise OptionError(
            f"ema={settings.ema!r}: an average of weights that differ between processes would too; "
            "leave it out, or average gradients in place of weights"
        )
    run = Run(
        model, optimizer, lessons, loss, epochs, judge, generator, settings, regimes,
        log or TrainingLog(show=False),
    )  # fmt: skip
    try:
        run.start()
        run.train()
    except ModelError as error:
        # What was kept of the training leads to the same failure; its best state does not.
        run.log.forget()
        run.kept.restore()
        path = run.rescue()
        if path is not None:
            error.args = (
                f"{error}. The network as it was behind epoch {run.best_epoch} is in {path}",
            )
        raise
    finally:
        run.kept.restore()
    curve = run.curve
    curve.kept = run.best_epoch
    return Fitted(*curve.bounds(), run.step, run.best_epoch, curve)


@dataclass
class Run:
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
        self.device = self.trained[0].device
        self.kept = Snapshot(self.tensors)
        decay = self.settings.ema
        self.average = None if decay is None else Average(self.tensors, decay)
        half = self.settings.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.health = Health(self.steps)
        # How random numbers stood at the start of an epoch that is under way: those of the order
        # of batches, and torch's own.
        self.random: list[Any] | None = None
        self.counted = False

    def start(self) -> None:
        """At the beginning, or where a checkpoint says."""
        self.about = identity_of(self) if self.log.path is not None else ""
        for regime in self.regimes:
            regime.begin(self.model, self.steps)
        if (state := last_kept(self)) is not None:
            resume(self, state)
        else:
            self._judge()

    def train(self) -> None:
        """All that is left."""
        with self.log.bar(self.steps, self.step) as bar:
            while self.epoch < self.epochs and not self._stale():
                for group in self._groups():
                    value = self._step(group)
                    self.curve.add(value)
                    bar.advance(note=f"loss {value:.4g}")
                    self.batches += len(group)
                    if self._due():
                        self._store()
                self._check_whole()
                self.epoch += 1
                self.batches, self.random = 0, None
                self._judge()
                self._store()

    def rescue(self) -> Path | None:
        """Where the best state is kept, if it is more than the start and the network shows it."""
        own = {id(parameter) for parameter in self.model.parameters()}
        if not self.best_epoch or not any(id(parameter) in own for parameter in self.trained):
            return None
        return self.log.rescue(plain_state(self.model))

    def _check_whole(self) -> None:
        """Raises TaskError for fewer batches than regimes were told, who set their pace by it."""
        paced = any(regime.paced for regime in self.regimes)
        if paced and self.batches < len(self.lessons):
            raise TaskError(
                f"epoch {self.epoch + 1} had {self.batches} batches of {len(self.lessons)}: the "
                "loader gives fewer than it says, and what happens over the whole training would "
                "never end; correct its __len__"
            )

    def _due(self) -> bool:
        """Whether to keep a checkpoint between two steps."""
        due = self.log.due()
        for regime in self.regimes if self.log.path is not None else ():
            due = regime.due(due)
        return due

    def _store(self) -> None:
        together = not all(regime.alone for regime in self.regimes)
        self.log.store(state_of(self), spare=together)

    def _groups(self) -> Iterator[list[Lesson]]:
        """The batches of each step of this epoch, without those that a checkpoint has seen."""
        if self.random is None:
            self.random = [self.generator.get_state(), random_numbers(self.device)]
            lessons = self.lessons.epoch(self.generator)
        else:
            now = random_numbers(self.device)
            self.generator.set_state(self.random[0])
            set_random_numbers(self.random[1], self.device)
            lessons = self.lessons.epoch(self.generator, self.batches)
            set_random_numbers(now, self.device)
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
            if any(regime.leapt for regime in self.regimes):
                self.average.restart()
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
        return torch.autocast(self.device.type, dtype)

    def _judge(self) -> None:
        """Keeps this state if it is the best so far."""
        with nullcontext() if self.average is None else self.average.shown():
            for regime in self.regimes:
                regime.enforce()
            found = math.nan if self.judge is None else self.judge()
            if self.judge is not None:
                self.health.check_judged(found, self.step, self.curve.judged)
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
