"""What a network learns from: labels, or another network's answers to inputs without labels.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2, for answers as targets.
Differs: the divergence is the task's own, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from tersor.errors import TaskError
from tersor.surgery.hold import decoded
from tersor.task import Inputs, Task, evaluation_mode
from tersor.task.data import pieces

Lesson = tuple[Inputs, Tensor]


class Lessons(Protocol):
    """Batches to learn from, and what is to become small on them."""

    @property
    def task(self) -> Task:
        """Whose inputs they are."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def epoch(self, generator: torch.Generator) -> Iterator[Lesson]:
        """Every batch once, in an order drawn by `generator`."""
        ...

    def loss(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """A number, from rows of `task.predict`."""
        ...


@dataclass
class Labels:
    """The training data of a task. The loss is the task's own."""

    task: Task
    _count: int = field(default=0, init=False)

    def __len__(self) -> int:
        """Batches in an epoch; reads the data through once."""
        self._count = self._count or sum(1 for _ in self.task.train())
        return self._count

    def epoch(self, generator: torch.Generator) -> Iterator[Lesson]:
        """Training batches, shuffled."""
        yield from self.task.train(generator)

    def loss(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """Of the outputs and the labels."""
        return self.task.loss(outputs, self.task.targets(*lesson))


@dataclass(frozen=True)
class Answers:
    """Inputs without labels and another network's answers. The loss is the mean divergence."""

    task: Task
    given: Sequence[Lesson]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.given)

    def epoch(self, generator: torch.Generator) -> Iterator[Lesson]:
        """The batches in another order each time."""
        for place in torch.randperm(len(self.given), generator=generator).tolist():
            yield self.given[place]

    def loss(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """Mean divergence of the outputs from the other network's."""
        return self.task.divergence(lesson[1], outputs).mean()


@dataclass
class Teacher:
    """Another network's answers, asked for anew each time: a loader may vary its inputs.

    Inputs are those of the training data, whose labels play no part, or else of the calibration
    data. The loss is the mean divergence, of logits that are divided by the temperature.
    """

    original: nn.Module
    task: Task
    temperature: float = 1.0
    _count: int = field(default=0, init=False)

    def __len__(self) -> int:
        """Batches in an epoch; reads the data through once."""
        self._count = self._count or sum(1 for _ in self._inputs(torch.Generator()))
        return self._count

    def epoch(self, generator: torch.Generator) -> Iterator[Lesson]:
        """Every batch once, in another order each time, and the answers to it."""
        for inputs in self._inputs(generator):
            with evaluation_mode(self.original):
                answer = self.task.predict(self.original, inputs)
            yield inputs, answer

    def loss(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """Mean divergence of the outputs; times the square of the temperature, as its gradient."""
        wanted = lesson[1]
        if self.task.kind not in ("classification", "language"):
            return self.task.divergence(wanted, outputs).mean()
        t = self.temperature
        return t * t * self.task.divergence(wanted / t, outputs / t).mean()

    def _inputs(self, generator: torch.Generator) -> Iterator[Inputs]:
        if self.task.has_train:
            for inputs, _ in self.task.train(generator):
                yield inputs
        else:
            yield from shuffled(self.task.calibration(), generator)


def shuffled(
    batches: Sequence[Inputs], generator: torch.Generator, rows: int = 32
) -> Iterator[Inputs]:
    """Batches of at most `rows` rows, in an order drawn by `generator`."""
    parts = list(pieces(batches, rows))
    for place in torch.randperm(len(parts), generator=generator).tolist():
        yield parts[place]


def answers(
    original: nn.Module, task: Task, inputs: Sequence[Inputs], *, rows: int = 32
) -> Answers:
    """What `original` says about `inputs`, in batches of at most `rows` rows.

    rows: even, since two rows may be one pair of sentences
    """
    batches = list(pieces(inputs, rows))
    if not batches:
        raise TaskError("there are no calibration inputs to learn from; give the task some")
    with evaluation_mode(original), decoded(original):
        return Answers(task, [(batch, task.predict(original, batch)) for batch in batches])
