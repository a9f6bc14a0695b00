"""What a client does with its data in a round: a few epochs of plain gradient descent.

Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1, ClientUpdate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tersor.federated.options import check_count, check_number
from tersor.task import Task
from tersor.train import Labels, Lesson, fit

Trainer: TypeAlias = Callable[[nn.Module, Task, torch.Generator], None]
"""Trains a network on a task's training data, in place; batches in an order that is drawn."""


@dataclass(frozen=True)
class Local:
    """Trains by stochastic gradient descent at a constant rate.

    epochs: passes over the client's data in a round
    rate: of the steps, above 0
    momentum: 0 to below 1, begun anew in each round
    """

    epochs: int = 1
    rate: float = 0.1
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_number("rate", self.rate)
        check_number("momentum", self.momentum, most=math.nextafter(1.0, 0.0), zero=True)

    def __call__(self, model: nn.Module, task: Task, generator: torch.Generator) -> None:
        """See `Trainer`. Raises ModelError where training fails."""
        lessons = Labels(task)
        parameters = [p for p in model.parameters() if p.requires_grad]
        # `fit` keeps the state that is judged best; here it is always the last.
        verdicts = itertools.count(0, -1)

        def loss(lesson: Lesson) -> Tensor:
            return lessons.loss(task.predict(model, lesson[0]), lesson)

        model.train()
        with torch.enable_grad():
            fit(
                model,
                torch.optim.SGD(parameters, self.rate, self.momentum),
                lessons,
                loss,
                epochs=self.epochs,
                judge=lambda: float(next(verdicts)),
                generator=generator,
                training={"schedule": "constant", "warmup": 0.0, "clip": math.inf},
            )
        for parameter in parameters:
            parameter.grad = None
