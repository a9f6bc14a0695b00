"""Batches split among workers, by rows: worker r of W learns from the r-th of W even parts.

Parts differ by at most one sample, and gradients are averaged as if they did not. A batch with
fewer samples than workers goes to each of them whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.task import Task
from tersor.task.data import between, rows_in
from tersor.train.lessons import Lesson, Lessons


@dataclass(frozen=True)
class Portion:
    """What one worker learns from: its rows of each batch.

    Every worker has to draw the same order: give `fit` generators of one seed. Raises OptionError
    for a rank that is not from 0 to workers - 1.
    """

    lessons: Lessons
    rank: int
    workers: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.workers:
            raise OptionError(
                f"rank={self.rank!r} of workers={self.workers!r} must be from 0 to workers - 1; "
                "`world()` gives both under torchrun"
            )

    @property
    def task(self) -> Task:
        """Whose inputs they are."""
        return self.lessons.task

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.lessons)

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Lesson]:
        """This worker's part of every batch."""
        lessons = self.lessons.epoch(generator, skip)
        return (part_of(lesson, self.rank, self.workers) for lesson in lessons)

    def loss(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """As of the lessons that are split."""
        return self.lessons.loss(outputs, lesson)


def part_of(lesson: Lesson, rank: int, workers: int) -> Lesson:
    """The rows of worker `rank`."""
    rows = [len(rest) for rest in (lesson.targets, lesson.answer) if rest is not None]
    # A sample may be two rows of inputs (pairs), or many rows of answers (tokens).
    samples = math.gcd(rows_in(lesson.inputs), *rows)
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
