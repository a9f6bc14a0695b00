"""Decoupled distillation: how sure the teacher is of the target, and what it says of the others.

The divergence of softened answers weighs what the teacher says about the wrong classes by how
unsure it is of the right one, so a sure teacher teaches little. Here both parts have weights of
their own. For a small network that learns from labels and a large teacher that is nearly always
right; gains most with many classes. To bring a compressed network back to what it was, the plain
divergence of `distill.logits` asks for just that.

Source: Zhao et al. 2022 (DKD), arXiv:2203.08679, eq. 7.
Differs from the paper: without labels the teacher's likeliest class is the target, and no loss of
labels joins in; the rate warms up in place of this loss's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import TaskError
from tersor.methods.asked import original_of
from tersor.methods.learning import learn, lessons_of, trainable
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import Lesson, Teacher, TrainingLog
from tersor.train.lessons import CLASSES


@method
def decoupled(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    epochs: Annotated[int, Field(ge=1)] = 3,
    rate: Annotated[float, Field(gt=0, le=1)] = 5e-4,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    alpha: Annotated[float, Field(ge=0)] = 1.0,
    beta: Annotated[float, Field(ge=0)] = 2.0,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains everything that is stored as plain or sparse floats, in place.

    original: the teacher; `run` passes the network it was given, or its own `original`
    epochs: passes over the training inputs of the task, or its calibration inputs if it has none
    rate: the highest
    temperature: what logits are divided by
    alpha: of the divergence between target and not target; the paper leaves it at 1
    beta: of the divergence among all other classes; 1 to 8 in the paper, the more the surer the
        teacher
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs
    include, exclude: patterns, see `walk`; with them vectors that match nothing are trained too

    Where the task has training data, its labels are the targets, and its own loss is added. Without
    them the teacher's likeliest class is. With two classes nothing is left for beta. The best state
    on held-out inputs is kept, be it the start; the outcome is that of `distill.logits`. Raises
    TaskError without data or classes, OptionError where nothing can be trained, ModelError where
    training does not stay finite or the teacher tells other classes apart.
    """
    original = original_of("distill.decoupled", original)
    lessons = lessons_of("distill.decoupled", task, original, labels=0.0, log=log)
    assert isinstance(lessons, Teacher)
    if lessons.task.kind not in CLASSES:
        raise TaskError(
            f"distill.decoupled tells a target from other classes, and this task is one of "
            f"{lessons.task.kind}; use distill.logits"
        )

    def loss(outputs: Tensor, lesson: Lesson) -> Tensor:
        wanted = lessons.wanted(outputs, lesson).to(outputs.device)
        targets = wanted.argmax(1)
        if lesson.targets is not None:
            targets = lessons.task.targets(lesson.inputs, lesson.targets).to(outputs.device)
        apart = divergences(lessons.task, wanted / temperature, outputs / temperature, targets)
        value = temperature**2 * (alpha * apart[0] + beta * apart[1]).mean()
        return value if lesson.targets is None else value + lessons.task.loss(outputs, targets)

    return model, learn(
        "distill.decoupled",
        model,
        lessons,
        original,
        parameters=trainable("distill.decoupled", model, include, exclude),
        epochs=epochs,
        rate=rate,
        loss=loss,
        training=training,
        generator=generator,
        log=log,
    )


def divergences(
    task: Task, wanted: Tensor, outputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """(rows,) each, in nats: KL between target and not target, and among the other classes.

    wanted, outputs: (rows, classes) logits of teacher and student; targets: (rows,)
    """
    (true, true_others), (found, found_others) = (
        _parted(logits, targets) for logits in (wanted, outputs)
    )
    return task.divergence(true, found), task.divergence(true_others, found_others)


def _parted(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, 2) logits of target and not target; (rows, classes - 1) of the others alone."""
    place = targets[:, None]
    rest = torch.ones_like(logits, dtype=torch.bool).scatter(1, place, False)
    others = logits[rest].reshape(len(logits), -1)
    target = torch.cat([logits.gather(1, place), others.logsumexp(1, keepdim=True)], 1)
    return target, others
