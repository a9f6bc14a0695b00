"""Layers of transformers: embeddings, hidden states and attention come to be those of the teacher.

For a transformer with fewer or narrower blocks: block after block learns from one of the teacher's,
which takes less data than answers alone. Where the two differ in more, `distill.relations` asks
only how tokens relate to each other; for convolutional networks there is `distill.features`.

Source: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, eqs. 6 to 11.
Differs from the paper: layers and answers are learned together and not one after the other; each
place has a projection of its own, only where widths differ; attention is compared where both blocks
have as many heads, before rotary positions are applied, and in language models only to what a token
sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.methods.asked import original_of
from tersor.methods.inside import Inside, Paths, Regressors, learn_inside, probed, weights
from tersor.methods.learning import lessons_of
from tersor.methods.matching import Pair, blocks, matched
from tersor.methods.relating import Attention, attentions, by_heads
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import Teacher, TrainingLog


@method
def layers(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    epochs: Annotated[int, Field(ge=1)] = 3,
    rate: Annotated[float, Field(gt=0, le=1)] = 5e-4,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
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
    weight: of all layers together beside the divergence of answers
    pairs: blocks of the student -> blocks of the teacher, by path; None for repeated blocks,
        mapped uniformly
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws projections and the order of the inputs
    include, exclude: patterns, see `walk`; with them vectors that match nothing are trained too

    Embeddings are what the first block is given. Tokens that an attention_mask leaves out do not
    count, and projections are thrown away in the end. The best state on held-out inputs is kept, be
    it the start; the outcome is that of `distill.logits`, with the pairs and how many of them
    compare attention. Raises ModelError where no blocks match or give no tokens, OptionError for a
    path without a layer, and else as `distill.logits` does.
    """
    original = original_of("distill.layers", original)
    lessons = lessons_of("distill.layers", task, original, labels=0.0, temperature=temperature)
    assert isinstance(lessons, Teacher)
    generator = generator or torch.Generator().manual_seed(0)
    plan = _Plan.of(model, original, matched("distill.layers", model, original, pairs))
    seen, wanted = probed("distill.layers", model, original, lessons.task, plan.paths)
    projections = Regressors(plan.widths(seen, wanted), generator).to(seen.device)

    # A decoder that tells classes apart cannot be told from an encoder here.
    causal = lessons.task.kind == "language"

    def hint(seen: Inside, wanted: Inside) -> Tensor:
        calls = range(len(wanted.masks))
        each = [
            *plan.states(seen, wanted, projections),
            *(plan.attention(model, original, seen, wanted, call, causal=causal) for call in calls),
        ]
        return torch.stack(each).sum() / len(calls)

    outcome = learn_inside(
        "distill.layers",
        model,
        lessons,
        plan.paths,
        hint,
        weight=weight,
        epochs=epochs,
        rate=rate,
        regressors=projections,
        training=training,
        generator=generator,
        log=log,
        include=include,
        exclude=exclude,
    )
    found = {"pairs": [list(pair) for pair in plan.pairs], "attentions": len(plan.heads)}
    return model, {**outcome, **found}


def state_error(own: Tensor, theirs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of (n, tokens, width), eqs. 8 and 9. mask: (n, tokens)"""
    squares = (own.float() - theirs.to(own.device)).square()
    counts = weights(mask, theirs.mT.shape)
    if counts is None:
        return squares.mean()
    counts = counts[..., None].to(own.device)
    return (squares * counts).sum() / (counts.sum() * own.shape[-1])


def score_error(
    own: Tensor, theirs: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Mean squared error of (n, heads, tokens, tokens), eq. 7.

    mask: (n, tokens), 0 for what does not count
    causal: no token sees those behind it, so what they would score does not count
    """
    squares = (own.float() - theirs.to(own.device)).square()
    counts = weights(mask, theirs[:, 0].shape)
    if counts is None and not causal:
        return squares.mean()
    both = torch.ones_like(squares[:, :1])
    if counts is not None:
        both = (counts[:, None, :, None] * counts[:, None, None, :]).to(own.device)
    if causal:
        both = both.tril()
    return (squares * both).sum() / (both.sum() * own.shape[1])


def scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """(n, heads, tokens, tokens): attention before its softmax.

    query: (n, tokens, heads * width); key: the same, or of fewer heads that several queries share
    """
    many, few = by_heads(query, heads), by_heads(key, heads * key.shape[-1] // query.shape[-1])
    shared = few.repeat_interleave(heads // few.shape[1], 1)
    return many @ shared.mT / math.sqrt(many.shape[-1])


@dataclass(frozen=True)
class _Plan:
    """What is compared. inputs: the first blocks; heads: attention of both, and its heads."""

    pairs: Sequence[Pair]
    inputs: Pair
    heads: Sequence[tuple[Attention, Attention, int]]

    @classmethod
    def of(cls, model: nn.Module, original: nn.Module, pairs: Sequence[Pair]) -> _Plan:
        first = [
            next(iter(blocks(network)), [named])[0]
            for network, named in zip((model, original), pairs[0], strict=True)
        ]
        heads = []
        for own, theirs in pairs:
            both = [
                next((a for a in attentions(net) if f"{a.path}.".startswith(f"{path}.")), None)
                for net, path in ((model, own), (original, theirs))
            ]
            if both[0] and both[1] and both[0].heads and both[0].heads == both[1].heads:
                heads.append((both[0], both[1], both[0].heads))
        return cls(pairs, (first[0], first[1]), heads)

    @property
    def paths(self) -> Paths:
        """What must be watched in student and teacher."""
        own = [p for a, _, _ in self.heads for p in a.parts]
        theirs = [p for _, b, _ in self.heads for p in b.parts]
        return (
            [*(a for a, _ in self.pairs), self.inputs[0], *own],
            [*(b for _, b in self.pairs), self.inputs[1], *theirs],
        )

    def widths(self, seen: Inside, wanted: Inside) -> list[tuple[int, int]]:
        """Of student and teacher at each place. Raises ModelError where there are no tokens."""
        found = []
        for own, theirs in ((a[0], b[0]) for a, b in self._tensors(seen, wanted)):
            if own.dim() != 3 or own.shape[:2] != theirs.shape[:2]:
                raise ModelError(
                    f"distill.layers compares (n, tokens, width), and blocks give "
                    f"{tuple(own.shape)} in the student and {tuple(theirs.shape)} in the teacher; "
                    "match others with pairs, or use distill.features"
                )
            found.append((own.shape[2], theirs.shape[2]))
        return found

    def states(self, seen: Inside, wanted: Inside, projections: Regressors) -> list[Tensor]:
        """The errors of embeddings and hidden states, call by call."""
        return [
            state_error(projections(place, own.mT).mT, theirs, mask)
            for place, (a, b) in enumerate(self._tensors(seen, wanted))
            for own, theirs, mask in zip(a, b, wanted.masks, strict=True)
        ]

    def attention(
        self,
        model: nn.Module,
        original: nn.Module,
        seen: Inside,
        wanted: Inside,
        call: int,
        *,
        causal: bool,
    ) -> Tensor:
        """The error of all attention in one call. causal: see `score_error`"""
        total = torch.zeros((), device=seen.device)
        for own, theirs, heads in self.heads:
            query, key, _ = own.projected(model, seen, call)
            small = scores(query, key, heads)
            query, key, _ = theirs.projected(original, wanted, call)
            large = scores(query, key, heads)
            total = total + score_error(small, large, wanted.masks[call], causal=causal)
        return total

    def _tensors(self, seen: Inside, wanted: Inside) -> list[tuple[list[Tensor], list[Tensor]]]:
        hidden = [(seen.outputs[a], wanted.outputs[b]) for a, b in self.pairs]
        return [(seen.inputs[self.inputs[0]], wanted.inputs[self.inputs[1]]), *hidden]
