"""Distillation: the whole network is trained to answer as another one does.

After cutting, pruning or low rank, with the network as it was for a teacher, whenever there are
more inputs than a few hundred: nothing else takes back as much. Or for a small network of its own,
with any teacher. It needs minutes where other recoveries need seconds, and what is quantized
already stays: train before, or use `recover.scales` behind.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2 and eq. 4 for the temperature's
square; Sun et al. 2024, arXiv:2403.01427, algorithm 1, for standardized logits.
Differs from the papers: labels play no part unless asked to; for sentence pairs and numbers the
divergence is the task's own; zeros of pruned weights stay zero, and their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from tersor.methods.asked import original_of
from tersor.methods.learning import learn, lessons_of, trainable
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import TrainingLog


@method
def logits(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    epochs: Annotated[int, Field(ge=1)] = 3,
    rate: Annotated[float, Field(gt=0, le=1)] = 5e-4,
    temperature: Annotated[float, Field(gt=0)] = 2.0,
    standardize: bool = False,
    labels: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains everything that is stored as plain or sparse floats, in place.

    original: the teacher; `run` passes the network it was given, or its own `original`
    log: one with a folder also keeps the teacher's answers there, see `tersor.train.memory`
    epochs: passes over the training inputs of the task, or its calibration inputs if it has none
    rate: the highest
    temperature: what logits are divided by, for classes; from about 50 on the logits themselves
        are matched
    standardize: whether logits of each sample are brought to mean 0 and deviation 1 before that
    labels: share of the task's own loss, which needs labelled training data; 0 to below 1
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs
    include, exclude: patterns, see `walk`; with them vectors that match nothing are trained too

    The best state on held-out inputs is kept, be it the start; the step's outcome says whether
    anything changed, with the divergence before and after. Raises OptionError where nothing can be
    trained, TaskError without data, ModelError where training does not stay finite, or where the
    teacher tells other classes apart.
    """
    original = original_of("distill.logits", original)
    lessons = lessons_of(
        "distill.logits",
        task,
        original,
        labels=labels,
        temperature=temperature,
        standardize=standardize,
        log=log,
    )
    return model, learn(
        "distill.logits",
        model,
        lessons,
        original,
        parameters=trainable("distill.logits", model, include, exclude),
        epochs=epochs,
        rate=rate,
        training=training,
        generator=generator,
        log=log,
    )
