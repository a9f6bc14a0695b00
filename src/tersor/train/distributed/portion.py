"""Batches split among workers, by rows: worker r of W learns from the r-th of W even parts.

Parts differ by at most one sample, and gradients are averaged as if they did not. A batch with
fewer samples than workers goes to each of them whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.task import Task
from tersor.train.lessons import Lesson, Lessons, part_of


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
        each = self.task.rows_per_sample
        return (part_of(lesson, self.rank, self.workers, each) for lesson in lessons)

    def loss(self, outputs: Tensor, lesson: Lesson) -> Tensor:
        """As of the lessons that are split."""
        return self.lessons.loss(outputs, lesson)
