"""Attention transfer: layers of the student come to look where layers of the teacher look.

A map of attention is the energy of all channels at each place. So student and teacher may have any
number of channels, and no regressor is needed. For convolutional networks, where `distill.features`
says too much to a student that is built otherwise; transformers are better taught by
`distill.layers` or `distill.relations`.

Source: Zagoruyko, Komodakis 2017, arXiv:1612.03928, eq. 2 with F_sum^2, beside Hinton, Vinyals,
Dean 2015, arXiv:1503.02531, for the answers.
Differs from the paper: every pair of blocks is matched, not only the last of each stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.methods.asked import original_of
from tersor.methods.inside import (
    Inside,
    channels_first,
    learn_inside,
    probed,
    same_places,
    weights,
)
from tersor.methods.learning import lessons_of
from tersor.methods.matching import matched
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import Teacher, TrainingLog


@method
def attention(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    epochs: Annotated[int, Field(ge=1)] = 3,
    rate: Annotated[float, Field(gt=0, le=1)] = 5e-4,
    temperature: Annotated[float, Field(gt=0)] = 2.0,
    weight: Annotated[float, Field(ge=0)] = 1.0,
    pairs: Mapping[str, str] | None = None,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains everything that is stored as plain or sparse floats, in place.

    original: the teacher; `run` passes the network it was given, or its own `original`
    epochs: passes over the training inputs of the task, or its calibration inputs if it has none
    rate: the highest
    temperature: what logits are divided by, for classes
    weight: of the maps beside the divergence of answers, the paper's beta
    pairs: layers of the student -> layers of the teacher, by path; None for repeated blocks,
        mapped uniformly
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs
    include, exclude: patterns, see `walk`; with them vectors that match nothing are trained too

    Maps of two sizes are averaged down to the smaller; tokens that an attention_mask leaves out do
    not count. The best state on held-out inputs is kept, be it the start; the outcome is that of
    `distill.logits`, with the pairs. Raises ModelError where no blocks match, or a layer has a
    single place, OptionError for a path without a layer, and else as `distill.logits` does.
    """
    original = original_of("distill.attention", original)
    lessons = lessons_of("distill.attention", task, original, labels=0.0, temperature=temperature)
    assert isinstance(lessons, Teacher)
    found = matched("distill.attention", model, original, pairs)
    paths = [a for a, _ in found], [b for _, b in found]
    layers = [(model.get_submodule(a), original.get_submodule(b)) for a, b in found]

    def hint(seen: Inside, wanted: Inside) -> Tensor:
        values = []
        for (a, b), (small, large) in zip(found, layers, strict=True):
            calls = zip(seen.outputs[a], wanted.outputs[b], wanted.masks, strict=True)
            for own, theirs, mask in calls:
                one, other = channels_first(own, small), channels_first(theirs, large)
                values.append(apart(one, other, mask))
        return 0.5 * torch.stack(values).sum()

    # Layers that cannot be compared are refused before anything is trained.
    hint(*probed("distill.attention", model, original, lessons.task, paths))
    outcome = learn_inside(
        "distill.attention",
        model,
        lessons,
        paths,
        hint,
        weight=weight,
        epochs=epochs,
        rate=rate,
        training=training,
        generator=generator,
        log=log,
        include=include,
        exclude=exclude,
    )
    return model, {**outcome, "pairs": [list(pair) for pair in found]}


def apart(own: Tensor, theirs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean distance of two maps of attention, each of length 1: 0 to 2.

    own, theirs: (n, channels, places, ...), of any number of channels each
    mask: (n, places), 0 for what does not count
    """
    one, other = same_places(energy(own), energy(theirs.to(own.device)))
    counts = weights(mask, other.shape)
    if counts is not None:
        one, other = (part * counts[:, None].to(own.device) for part in (one, other))
    one, other = (nn.functional.normalize(part.flatten(1), dim=1) for part in (one, other))
    distances: Tensor = torch.linalg.vector_norm(one - other, dim=1)
    return distances.mean()


def energy(output: Tensor) -> Tensor:
    """(n, 1, places, ...): the sum of squares over channels."""
    if output.dim() < 3:
        raise ModelError(
            f"distill.attention compares places, and a layer gives {tuple(output.shape)}, which "
            "has none; name others with pairs, or use distill.features"
        )
    return output.square().sum(1, keepdim=True)
