"""Hints: layers of the student are trained to give what layers of the teacher give.

For a student of the teacher's kind that is thin or of fewer blocks: what lies inside says more than
answers do, and says it to each layer at once. `distill.attention` asks only where a layer looks,
which suits students that are built otherwise; transformers are better taught by `distill.layers`.

Source: Romero et al. 2015 (FitNets), arXiv:1412.6550, eq. 3, beside Hinton, Vinyals, Dean 2015,
arXiv:1503.02531, for the answers.
Differs from the paper: hints and answers are learned together and not one after the other; errors
are divided by the mean square of the teacher's layer, so that one weight suits all; a regressor is
linear in the channels, a 1x1 convolution, and only where their numbers differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.methods.asked import original_of
from tersor.methods.inside import (
    Inside,
    Regressors,
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
def features(
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
    weight: of the hints beside the divergence of answers
    pairs: layers of the student -> layers of the teacher, by path; None for repeated blocks,
        mapped uniformly
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws regressors and the order of the inputs
    include, exclude: patterns, see `walk`; with them vectors that match nothing are trained too

    Pictures of two sizes are averaged down to the smaller, tokens that an attention_mask leaves out
    do not count, and regressors are thrown away in the end. The best state on held-out inputs is
    kept, be it the start; the outcome is that of `distill.logits`, with the pairs. Raises
    ModelError where no blocks match or a layer gives no tensor, OptionError for a path without a
    layer, and else as `distill.logits` does.
    """
    original = original_of("distill.features", original)
    lessons = lessons_of("distill.features", task, original, labels=0.0, temperature=temperature)
    assert isinstance(lessons, Teacher)
    generator = generator or torch.Generator().manual_seed(0)
    found = matched("distill.features", model, original, pairs)
    paths = [a for a, _ in found], [b for _, b in found]
    layers = [(model.get_submodule(a), original.get_submodule(b)) for a, b in found]
    seen, wanted = probed("distill.features", model, original, lessons.task, paths)
    widths = [
        (channels_first(own, small).shape[1], channels_first(theirs, large).shape[1])
        for (small, large), (a, b) in zip(layers, found, strict=True)
        for own, theirs in [(seen.outputs[a][0], wanted.outputs[b][0])]
    ]
    regressors = Regressors(widths, generator).to(seen.device)

    def hint(seen: Inside, wanted: Inside) -> Tensor:
        values = []
        for place, ((a, b), (small, large)) in enumerate(zip(found, layers, strict=True)):
            calls = zip(seen.outputs[a], wanted.outputs[b], wanted.masks, strict=True)
            for own, theirs, mask in calls:
                guess = regressors(place, channels_first(own, small))
                values.append(error(guess, channels_first(theirs, large), mask))
        return torch.stack(values).mean()

    outcome = learn_inside(
        "distill.features",
        model,
        lessons,
        paths,
        hint,
        weight=weight,
        epochs=epochs,
        rate=rate,
        regressors=regressors,
        training=training,
        generator=generator,
        log=log,
        include=include,
        exclude=exclude,
    )
    return model, {**outcome, "pairs": [list(pair) for pair in found]}


def error(own: Tensor, theirs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Half of the mean squared error, over the mean square of `theirs`.

    own, theirs: (n, channels, places, ...), averaged down to common places
    mask: (n, places), 0 for what does not count
    """
    own, theirs = same_places(own, theirs.to(own.device))
    counts = weights(mask, theirs.shape)
    if counts is None:
        return 0.5 * (own - theirs).square().mean() / _safe(theirs.square().mean())
    counts = counts[:, None].to(own.device)
    apart = (counts * (own - theirs).square()).sum()
    return 0.5 * apart / _safe((counts * theirs.square()).sum())


def _safe(scale: Tensor) -> Tensor:
    return scale.clamp(min=torch.finfo(scale.dtype).tiny)
