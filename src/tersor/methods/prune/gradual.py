"""Gradual magnitude pruning: the network trains while its smallest weights go, a few at a time.

Where there is data and time to train, for 80 % of zeros and more: each time a few weights go, the
others have learned to do without them. Cutting once (`prune.magnitude`) and training behind it
(`distill.logits`) costs as much and keeps less. For a network that was fine-tuned from another one
at 90 % and more, compare `prune.movement`.

Source: Zhu and Gupta 2017, arXiv:1710.01878, eq. 1 (cubic schedule) and section 3 (masks).
Differs from the paper: it starts from a trained network, whose answers are part of the lesson;
the sparsity has grown after 0.6 of the steps; n:m patterns and one comparison of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from tersor.methods.learning import learn, trainable
from tersor.methods.masking import Masking, behind_mask, check_room, freeze, masked, schooling
from tersor.methods.masks import Sparsity, chosen
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import TrainingLog


@method
def gradual(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    sparsity: Sparsity = 0.8,
    scope: Literal["layer", "global"] = "layer",
    epochs: Annotated[int, Field(ge=1)] = 10,
    rate: Annotated[float, Field(gt=0, le=1)] = 1e-3,
    labels: Annotated[float, Field(ge=0, le=1)] | None = None,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains the network while weights become zero, and stores the rest under a bitmask, in place.

    original: whose answers are learned and judge; by default the network as it is now
    sparsity: fraction of the weights that become zero, above 0 and below 1; or a pattern such as
        "2:4", for 2 of every 4 neighbouring inputs that stay
    scope: "layer" removes the same fraction of each; "global" compares all chosen weights with each
        other, so that layers with small weights lose more
    epochs: passes over the training data, or over the calibration inputs where there is none
    rate: the highest
    labels: share of the task's own loss, 0 to 1, beside that of the original's answers; by default
        half where there are labels. With 1 there is no teacher, as for an untrained network
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs
    include, exclude: patterns on names and types, see `walk`; other layers are not trained either

    Removes exactly round(sparsity * n) of n weights; zeros that were there stay, and count. Of the
    states with all of them gone the best on held-out inputs is kept. A pattern leaves layers alone
    whose inputs m does not divide; the step's outcome names them, beside the judge's figures.
    Raises OptionError for a layer that would lose all its weights, or that is quantized already,
    and where nothing is left to prune; TaskError without data. After an error all is as it was.
    """
    found = chosen(model, sparsity, include, exclude)
    check_room(found.sites, sparsity, scope)
    lessons, teacher = schooling("prune.gradual", model, task, original, labels)
    with masked(model, found.sites, behind_mask):
        outcome = learn(
            "prune.gradual",
            model,
            lessons,
            teacher,
            parameters=trainable("prune.gradual", model, include, exclude),
            epochs=epochs,
            rate=rate,
            training=training,
            generator=generator,
            regimes=[Masking(found.sites, sparsity, scope)],
            log=log,
        )
    freeze(found.sites, sparsity)
    return model, {**outcome, **found.outcome}
