"""What a network learns from: labels, another network's answers to the same inputs, or both.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2 and eq. 4, for answers as targets;
Sun et al. 2024, arXiv:2403.01427, algorithm 1, for logits that are standardized.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tersor.errors import ModelError, TaskError
from tersor.surgery.hold import decoded
from tersor.task import Inputs, Task, evaluation_mode
from tersor.task.data import between, pieces, rows_in
from tersor.train.memory import Memory

T = TypeVar("T")
CLASSES = ("classification", "language")
"""Kinds of tasks whose answers are logits."""


class Lesson(NamedTuple):
    """One batch.

    targets: labels, where there are any
    answer: what another network says, as rows of `task.predict`
    inside: what was taken down of its layers meanwhile, see `Teacher`
    """

    inputs: Inputs
    targets: Tensor | None = None
    answer: Tensor | None = None
    inside: Any = None


class Lessons(Protocol):
    """Batches to learn from, and what is to become small on them."""

    @property
    def task(self) -> Task:
        """Whose inputs they are."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Lesson]:
        """Every batch once, in an order drawn by `generator`, without the first `skip`.

        Those are drawn before it returns.
        """
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
        """Batches in an epoch; a loader that does not say it is read through once."""
        self._count = self._count or self.task.train_batches()
        return self._count

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Lesson]:
        """Training batches, shuffled."""
        return itertools.starmap(Lesson, behind(self.task.train(generator), skip))

    def loss(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """Of the outputs and the labels."""
        assert lesson.targets is not None
        return self.task.loss(outputs, self.task.targets(lesson.inputs, lesson.targets))


@dataclass(frozen=True)
class Answers:
    """Inputs without labels and another network's answers. The loss is the mean divergence."""

    task: Task
    given: Sequence[Lesson]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.given)

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Lesson]:
        """The batches in another order each time."""
        order = torch.randperm(len(self.given), generator=generator).tolist()
        return (self.given[place] for place in order[skip:])

    def loss(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """Mean divergence of the outputs from the other network's."""
        assert lesson.answer is not None
        return self.task.divergence(lesson.answer, outputs).mean()


@dataclass
class Teacher:
    """Another network's answers, asked for anew each time: a loader may vary its inputs.

    Inputs are those of the training data, or else of the calibration data. The loss is the mean
    divergence, of logits that are divided by the temperature.

    standardize: logits of each row to mean 0 and deviation 1 before that, so that a small network
        need not give numbers as large as the teacher's
    labels: share of the task's own loss in the whole, 0 to 1; 0 looks at no label
    watch: entered around each run of `original`; what it gives goes with the lesson as `inside`
    folder: where answers are kept, so that no row of inputs is asked about twice, see `Memory`;
        nothing is watched then
    part: (rank, workers), of a worker that is asked about its own rows of each batch
    """

    original: nn.Module
    task: Task
    temperature: float = 1.0
    standardize: bool = False
    labels: float = 0.0
    watch: Callable[[], AbstractContextManager[Any]] = nullcontext
    folder: Path | None = None
    part: tuple[int, int] = (0, 1)
    _count: int = field(default=0, init=False)
    _memory: Memory | None = field(default=None, init=False)

    def __len__(self) -> int:
        """Batches in an epoch; a loader that does not say it is read through once."""
        self._count = self._count or self._length()
        return self._count

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Lesson]:
        """Every batch once, in another order each time, and the answers to it."""
        if self.folder is not None:
            self._memory = self._memory or Memory(self.folder, self.original, self.task)
            self._memory.begin()
        return map(self._answered, behind(self._batches(generator), skip))

    def loss(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """Mean divergence of the outputs, and the share of the labels' loss."""
        value = self.apart(outputs, lesson)
        if self.labels:
            assert lesson.targets is not None
            own = self.task.loss(outputs, self.task.targets(lesson.inputs, lesson.targets))
            value = self.labels * own + (1 - self.labels) * value
        return value

    def apart(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """Mean divergence; times the square of the temperature, as its gradient is without."""
        wanted = self.wanted(outputs, lesson)
        if self.task.kind not in CLASSES:
            return self.task.divergence(wanted, outputs).mean()
        if self.standardize:
            wanted, outputs = standardized(wanted), standardized(outputs)
        t = self.temperature
        return t * t * self.task.divergence(wanted / t, outputs / t).mean()

    def wanted(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """The answer to the lesson. Raises ModelError where its rows are not as long."""
        assert lesson.answer is not None
        check_alike(lesson.answer, outputs)
        return lesson.answer

    def _answered(self, lesson: Lesson) -> Lesson:
        def ask(inputs: Inputs) -> Tensor:
            # Of few bits where products are.
            return self.task.predict(self.original, inputs).float()

        with evaluation_mode(self.original):
            if self._memory is not None:
                return lesson._replace(answer=self._memory.answered(lesson.inputs, ask))
            with self.watch() as inside:
                return lesson._replace(answer=ask(lesson.inputs), inside=inside)

    def _length(self) -> int:
        if self.task.has_train:
            return self.task.train_batches()
        return sum(1 for _ in self._batches(torch.Generator()))

    def _batches(self, generator: torch.Generator) -> Iterator[Lesson]:
        whole: Iterator[Lesson]
        if self.task.has_train:
            whole = itertools.starmap(Lesson, self.task.train(generator))
        else:
            whole = map(Lesson, shuffled(self.task.calibration(), generator))
        each = self.task.rows_per_sample
        return (part_of(lesson, *self.part, each) for lesson in whole)


def part_of(lesson: Lesson, rank: int, workers: int, each: int = 1) -> Lesson:
    """The rows of worker `rank`. each: rows of inputs that are one sample at least, as of pairs"""
    rows = [len(rest) for rest in (lesson.targets, lesson.answer) if rest is not None]
    # A sample may be many rows of answers (tokens).
    samples = math.gcd(rows_in(lesson.inputs) // each, *rows)
    if samples < workers:
        return lesson
    start, stop = samples * rank // workers, samples * (rank + 1) // workers

    def own(rest: Tensor | None) -> Tensor | None:
        if rest is None:
            return None
        each = len(rest) // samples
        return rest[start * each : stop * each]

    each = rows_in(lesson.inputs) // samples
    inputs = between(lesson.inputs, start * each, stop * each)
    return Lesson(inputs, own(lesson.targets), own(lesson.answer), lesson.inside)


def check_alike(wanted: Tensor, outputs: Tensor) -> None:
    """Raises ModelError unless rows of teacher and network are of one shape."""
    if wanted.shape[1:] != outputs.shape[1:]:
        raise ModelError(
            f"the teacher gives {tuple(wanted.shape[1:])} numbers for each row and the network "
            f"{tuple(outputs.shape[1:])}; let both tell the same classes apart, as by another last "
            "layer on one of them"
        )


def standardized(logits: Tensor) -> Tensor:
    """(rows, classes) to mean 0 and standard deviation 1 in each row."""
    centred = logits - logits.mean(1, keepdim=True)
    # Below the root: at 0 it has no slope.
    return centred / centred.square().mean(1, keepdim=True).clamp(min=1e-12).sqrt()


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
        found = [Lesson(b, answer=task.predict(original, b)) for b in batches]
    return Answers(task, found)


def behind(batches: Iterator[T], skip: int) -> Iterator[T]:
    """What follows the first `skip`, which are read now and not with the next one."""
    for _ in itertools.islice(batches, skip):
        pass
    return batches
