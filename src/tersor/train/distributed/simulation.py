"""Many workers in one process: what a compressor does to training, without any other machine.

Workers take turns, each with its rows of every batch, and run the code that real ones would run.
So losses and bytes are those of real workers; time is not.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.task.data import check_count
from tersor.train.distributed.compressor import Compressor
from tersor.train.distributed.diloco import DiLoCo, Outer
from tersor.train.distributed.exchange import in_one_process
from tersor.train.distributed.together import trained_of
from tersor.train.distributed.traffic import Traffic, plain_bytes
from tersor.train.lessons import Lesson, Lessons, part_of
from tersor.train.states import Snapshot, put, shared_statistics, statistics
from tersor.train.training import Training

Loss = Callable[[Lesson], Tensor]


@dataclass
class Simulated:
    """What a simulation came to.

    traffic: of one worker
    losses: means over workers, by step
    """

    traffic: Traffic = field(default_factory=Traffic)
    losses: list[float] = field(default_factory=list)


def simulate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lessons: Lessons,
    loss: Loss,
    *,
    compressor: Compressor,
    workers: int,
    epochs: int,
    generator: torch.Generator,
    training: Training | None = None,
) -> Simulated:
    """Trains what `optimizer` holds, in place, with gradients that `workers` workers average.

    loss: of one worker's rows
    compressor: copied for each worker
    generator: draws the order of the batches
    training: its schedule, warm-up and clipping (of averaged gradients) are used

    Raises OptionError for other settings that differ from their defaults, TaskError without
    batches.
    """
    settings = _settings(training)
    check_count(workers, "workers")
    team = [copy.deepcopy(compressor) for _ in range(workers)]
    trained, changing = trained_of(model), statistics(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    count, done = _count(lessons), Simulated()
    for epoch in range(epochs):
        seen = [[buffer.clone() for buffer in changing] for _ in range(workers)]
        for step, batch in enumerate(lessons.epoch(generator), epoch * count):
            _set_rates(optimizer, rates, settings.rate(step, epochs * count))
            parts = [part_of(batch, rank, workers) for rank in range(workers)]
            gradients, value = _gradients(trained, loss, parts, changing, seen)
            talks = [one.average(own) for one, own in zip(team, gradients, strict=True)]
            averaged, sent = in_one_process(talks)
            for parameter, gradient in zip(trained, averaged[0], strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
            done.losses.append(value)
            done.traffic.sent += sent
            done.traffic.plain += plain_bytes(trained)
        done.traffic.sent += _average(model, changing, seen)
    return done


def simulate_local(
    model: nn.Module,
    inner: Callable[[], torch.optim.Optimizer],
    lessons: Lessons,
    loss: Loss,
    settings: DiLoCo,
    *,
    workers: int,
    epochs: int,
    generator: torch.Generator,
    training: Training | None = None,
) -> Simulated:
    """Trains `model` in place by local updates: many steps alone, then one together.

    inner: makes an optimizer of the model's parameters, once for each worker
    training: the schedule is that of the inner rate
    others: as in `simulate`
    """
    check_count(workers, "workers")
    steps, done = epochs * _count(lessons), Simulated()
    trained, changing = trained_of(model), statistics(model)
    common = Outer(trained, settings)
    team = [settings.own_compressor() for _ in range(workers)]
    alone = [_Alone(inner(), trained, loss, _settings(training), steps) for _ in range(workers)]
    batches = _batches(lessons, epochs, generator)
    while given := list(itertools.islice(batches, settings.every)):
        start, first = Snapshot([*trained, *changing]), len(done.losses)
        moved, seen, losses = [], [], []
        for rank, worker in enumerate(alone):
            start.restore()
            losses.append(worker.steps([part_of(b, rank, workers) for b in given], first))
            moved.append(common.moved(trained))
            seen.append([buffer.clone() for buffer in changing])
        talks = [one.average(own) for one, own in zip(team, moved, strict=True)]
        averaged, sent = in_one_process(talks)
        common.step(averaged[0])
        put(trained, common.weights)
        done.losses += [sum(column) / workers for column in zip(*losses, strict=True)]
        done.traffic.sent += sent + _average(model, changing, seen)
        done.traffic.plain += len(given) * plain_bytes(trained)
    return done


@dataclass
class _Alone:
    """A worker that trains by itself; the weights are lent to it for a while."""

    optimizer: torch.optim.Optimizer
    trained: list[nn.Parameter]
    loss: Loss
    settings: Training
    of: int

    def __post_init__(self) -> None:
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def steps(self, batches: Sequence[Lesson], first: int) -> list[float]:
        """Trains on each batch, the first of which is step `first`. Returns the losses."""
        losses = []
        for step, batch in enumerate(batches, first):
            _set_rates(self.optimizer, self.rates, self.settings.rate(step, self.of))
            self.optimizer.zero_grad()
            value = self.loss(batch)
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(self.trained, self.settings.clip)
            self.optimizer.step()
            losses.append(float(value.detach()))
        return losses


def _gradients(
    trained: Sequence[nn.Parameter],
    loss: Loss,
    parts: Sequence[Lesson],
    changing: Sequence[Tensor],
    seen: Sequence[list[Tensor]],
) -> tuple[list[list[Tensor]], float]:
    """Each worker's gradients, and the mean of their losses.

    changing: statistics of the network; seen: each worker's own of them, which come to be the next
    """
    gradients, total = [], 0.0
    for part, own in zip(parts, seen, strict=True):
        put(changing, own)
        value = loss(part)
        found = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
        gradients.append(list(found))
        put(own, changing)
        total += float(value.detach()) / len(parts)
    return gradients, total


def _average(model: nn.Module, changing: Sequence[Tensor], seen: Sequence[Sequence[Tensor]]) -> int:
    """Puts the means of what workers saw into the network. Returns the bytes that each sends."""
    shared = {id(buffer) for buffer in shared_statistics(model)}
    sent = 0
    for buffer, column in zip(changing, zip(*seen, strict=True), strict=True):
        if id(buffer) in shared:
            buffer.copy_(torch.stack(list(column)).double().mean(0))
            sent += 8 * buffer.numel()
        else:
            buffer.copy_(column[0])
    return sent


def _batches(lessons: Lessons, epochs: int, generator: torch.Generator) -> Iterator[Lesson]:
    for _ in range(epochs):
        yield from lessons.epoch(generator)


def _count(lessons: Lessons) -> int:
    if not len(lessons):
        raise TaskError("there are no batches to train on; give the task train=(inputs, targets)")
    return len(lessons)


def _set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float], share: float) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * share


def _settings(training: Training | None) -> Training:
    settings = training or Training()
    plain = replace(
        Training(), schedule=settings.schedule, warmup=settings.warmup, clip=settings.clip
    )
    if settings != plain:
        raise OptionError(
            f"training={settings!r}: a simulation knows schedule, warmup and clip; leave the rest "
            "as it is, or train in processes"
        )
    return settings
