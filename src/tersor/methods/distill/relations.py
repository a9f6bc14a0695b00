"""Relations: in one attention layer, tokens come to be as alike as they are in the teacher.

How alike queries, keys and values of all tokens are to one another does not depend on how wide a
network is, or how many heads and layers it has. So any transformer teaches any other that reads the
same tokens, by one layer alone. `distill.layers` says more where student and teacher are built
alike.

Source: Wang et al. 2021 (MiniLMv2), arXiv:2012.15828, eqs. 4 to 9.
Differs from the paper: the divergence of the task's answers is learned beside, so that the layers
behind learn too; the last layer of both is taken unless others are named; relations are those
before rotary positions are applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.methods.asked import original_of
from tersor.methods.inside import Inside, learn_inside, probed, weights
from tersor.methods.learning import lessons_of
from tersor.methods.matching import named
from tersor.methods.relating import Attention, attention_at, by_heads
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import Teacher, TrainingLog

_NARROWEST = 16
"""Width of a relation head, at least, where their number is not given."""


@method
def relations(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    epochs: Annotated[int, Field(ge=1)] = 3,
    rate: Annotated[float, Field(gt=0, le=1)] = 5e-4,
    heads: Annotated[int, Field(ge=1)] | None = None,
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
    heads: relation heads; must divide all widths of queries, keys and values in both networks;
        None for as many as leave 16 numbers to each
    weight: of the relations beside the divergence of answers
    pairs: attention of the student -> attention of the teacher, by path, or layers that hold one;
        None for the last ones
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs
    include, exclude: patterns, see `walk`; with them vectors that match nothing are trained too

    Tokens that an attention_mask leaves out count neither as one nor as the other. The best state
    on held-out inputs is kept, be it the start; the outcome is that of `distill.logits`, with the
    pairs and the heads. Raises ModelError for a network without attention, OptionError for heads
    that do not divide, and else as `distill.logits` does.
    """
    original = original_of("distill.relations", original)
    lessons = lessons_of("distill.relations", task, original, labels=0.0)
    assert isinstance(lessons, Teacher)
    found = _pairs(model, original, pairs)
    paths = (
        [part for own, _ in found for part in own.parts],
        [part for _, theirs in found for part in theirs.parts],
    )
    seen, wanted = probed("distill.relations", model, original, lessons.task, paths)
    widths = {
        part.shape[-1]
        for own, theirs in found
        for part in (*own.projected(model, seen, 0), *theirs.projected(original, wanted, 0))
    }
    several = _several(heads, widths)

    def hint(seen: Inside, wanted: Inside) -> Tensor:
        values = [
            divergence(
                own.projected(model, seen, call),
                theirs.projected(original, wanted, call),
                several,
                wanted.masks[call],
            )
            for own, theirs in found
            for call in range(theirs.called(wanted))
        ]
        return torch.stack(values).mean()

    outcome = learn_inside(
        "distill.relations",
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
    return model, {**outcome, "pairs": [[a.path, b.path] for a, b in found], "heads": several}


def divergence(
    own: Sequence[Tensor], theirs: Sequence[Tensor], heads: int, mask: Tensor | None = None
) -> Tensor:
    """Of the student's relations from the teacher's: mean over heads and tokens, summed over three.

    own, theirs: queries, keys and values, (n, tokens, width) of any width each
    mask: (n, tokens), 0 for tokens that do not count
    """
    counts = weights(mask, theirs[0].transpose(1, 2).shape)
    if counts is not None:
        counts = counts.to(own[0].device)
    total = own[0].new_zeros(())
    for one, other in zip(own, theirs, strict=True):
        small, large = (_relation(part, heads, counts) for part in (one, other.to(one.device)))
        terms = large.exp() * (large - small)
        if counts is not None:
            terms = terms * counts[:, None, :, None] * counts[:, None, None, :]
        tokens = counts.sum() if counts is not None else one.shape[0] * one.shape[1]
        total = total + terms.sum() / (heads * tokens)
    return total


def _relation(vectors: Tensor, heads: int, counts: Tensor | None) -> Tensor:
    """(n, heads, tokens, tokens): logarithms of how alike each token is to the others."""
    parts = by_heads(vectors, heads)
    alike = parts @ parts.mT / math.sqrt(parts.shape[-1])
    if counts is not None:
        # Not infinite: the logarithms are subtracted from one another.
        alike = alike.masked_fill(counts[:, None, None, :] == 0, torch.finfo(alike.dtype).min / 2)
    return alike.log_softmax(-1)


def _pairs(
    model: nn.Module, original: nn.Module, pairs: Mapping[str, str] | None
) -> list[tuple[Attention, Attention]]:
    places = [(None, None)] if pairs is None else named(model, original, pairs)
    return [
        (
            attention_at("distill.relations", model, own, "student"),
            attention_at("distill.relations", original, theirs, "teacher"),
        )
        for own, theirs in places
    ]


def _several(heads: int | None, widths: set[int]) -> int:
    common = math.gcd(*widths)
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    if heads is None:
        wide = [n for n in divisors if min(widths) // n >= _NARROWEST]
        return max(wide, default=1)
    if heads not in divisors:
        raise OptionError(
            f"heads={heads} does not divide all of the widths {sorted(widths)} of queries, keys "
            f"and values; use one of {divisors}"
        )
    return heads
