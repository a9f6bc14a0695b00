"""Movement pruning: weights go that training moves towards zero, be they large or small.

For a network that was trained on much and is fine-tuned on something else, at 85 % of zeros and
more: there a weight's size still tells of the first training, and its movement of what it is needed
for now. For a network that stays with its task take `prune.gradual`.

Source: Sanh, Wolf, Rush 2020, arXiv:2005.07683, section 4 (hard movement pruning: scores learned
straight through the mask of the highest) and section 5 (cubic schedule).
Differs from the paper: scores are plain sums, as in its derivation, and have no rate of their own,
on which their order would not depend; the masks stay as they are after 0.6 of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.forms import SoftMask
from tersor.methods.learning import learn, trainable
from tersor.methods.masking import (
    Masking,
    check_precision,
    check_room,
    freeze,
    masked,
    schooling,
)
from tersor.methods.masks import Sparsity, chosen
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns, Site
from tersor.task import Task
from tersor.train import TrainingLog


@method
def movement(
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
    scope: "layer" removes the same fraction of each; "global" compares the movements of all chosen
        weights with each other
    epochs: passes over the training data, or over the calibration inputs where there is none
    rate: the highest
    labels: share of the task's own loss, 0 to 1, beside that of the original's answers; by default
        half where there are labels. With 1 there is no teacher
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs
    include, exclude: patterns on names and types, see `walk`; other layers are not trained either

    Removes exactly round(sparsity * n) of n weights; zeros that were there stay, and count. What is
    kept, reported and refused is as for `prune.gradual`; float16 is refused too, since the scores
    add up gradients of one scale. After an error all is as it was.
    """
    check_precision("prune.movement", training)
    found = chosen(model, sparsity, include, exclude)
    check_room(found.sites, sparsity, scope)
    lessons, teacher = schooling("prune.movement", model, task, original, labels)
    with masked(model, found.sites, scored):
        moving = Moving(found.sites, sparsity, scope)
        scores = {id(own) for own in moving.own}
        every = trainable("prune.movement", model, include, exclude)
        outcome = learn(
            "prune.movement",
            model,
            lessons,
            teacher,
            parameters=[parameter for parameter in every if id(parameter) not in scores],
            epochs=epochs,
            rate=rate,
            training=training,
            generator=generator,
            regimes=[moving],
            log=log,
        )
    freeze(found.sites, sparsity)
    return model, {**outcome, **found.outcome}


class Moving(Masking):
    """Hides the weights of the lowest scores. What is hidden may come back while masks grow."""

    def scores(self, form: SoftMask) -> Tensor:
        """How far the weight was moved away from zero, were it for the gradients alone."""
        assert form.scores is not None
        return form.scores.detach()

    def gradients(self, step: int) -> None:
        """Takes the gradients of a step off the scores."""
        for form in self.forms:
            assert form.scores is not None
            if form.scores.grad is not None:
                form.scores.detach().sub_(form.scores.grad)
                form.scores.grad = None

    def state(self) -> dict[str, Any]:
        """The scores too."""
        return {**super().state(), "scores": [self.scores(form) for form in self.forms]}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        super().restore(state)
        for form, scores in zip(self.forms, state["scores"], strict=True):
            self.scores(form).copy_(scores)


def scored(site: Site) -> SoftMask:
    """What a weight is held by while its movement decides."""
    return SoftMask.encode(site.weight, scored=True)
