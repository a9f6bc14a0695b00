"""Gradient pruning: the weights that the network's answers depend on least become zero.

Sizes say nothing of what comes behind a weight; gradients do, as far as there are any. A network
that is sure of all its answers has hardly any: calibrate on inputs that it was not trained on, or
take `prune.magnitude`. `score="fisher"` needs inputs alone. "taylor" and "movement" need labelled
training data; "movement" is for that of a new task, which moves weights one way. Where weights may
move as well, `prune.sparsegpt` and `prune.obs` lose far less.

Source: LeCun, Denker, Solla 1989, "Optimal Brain Damage", section 2.2, with the Fisher information
as in Theis et al. 2018, arXiv:1801.05787 ("fisher"); Molchanov et al. 2019, arXiv:1906.10771,
section 3.1 ("taylor"); Sanh, Wolf, Rush 2020, arXiv:2005.07683, section 4 ("movement").
Differs from the papers: one shot, and the weights that stay are as they were. The Fisher
information is that of answers drawn by the network itself. Movement adds up its scores in steps of
SGD without masks, on a copy that is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import ModelError, TaskError
from tersor.measure.running import differentiable_recurrence, unfused
from tersor.methods.masks import Sparsity, chosen, prune_by
from tersor.recipe import Outcome, method
from tersor.surgery.hold import release_all
from tersor.surgery.walk import Patterns, plain_copy, walk
from tersor.task import Task, evaluation_mode
from tersor.task.data import head, pieces, rows_in

_DRAWN = 8
"""Samples whose drawn answers share one gradient: more gradients say more, and take longer."""
_RATE = 0.01
"""Of the steps in which movement is watched."""

Weights = Sequence[Tensor]
Scores = list[Tensor]


@method
def gradient(
    model: nn.Module,
    task: Task | None = None,
    *,
    sparsity: Sparsity = 0.5,
    score: Literal["fisher", "taylor", "movement"] = "fisher",
    scope: Literal["layer", "global"] = "layer",
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Sets the weights of the lowest scores to zero and stores the rest, in place.

    sparsity: fraction of the weights that become zero, above 0 and below 1; or a pattern such as
        "2:4", for 2 of every 4 neighbouring inputs that stay
    score: of a weight w with the gradients g of all samples; "fisher": w^2 * mean g^2, from
        unlabelled inputs; "taylor": |w * mean g|; "movement": -sum w * g over steps of SGD, which
        is high for weights that move away from zero
    scope: "layer" removes the same fraction of each; "global" compares all chosen weights with each
        other, which is better as long as no layer ends up empty. A pattern keeps as many of each in
        either case
    samples: to use, at most
    include, exclude: patterns on names and types, see `walk`

    Removes exactly round(sparsity * n) of n weights; zeros that were there already go first. A
    pattern leaves layers alone whose inputs m does not divide; the step's outcome names them.
    Raises TaskError without data, or without labels for a score that needs them, OptionError for a
    layer that would lose all its weights, or that is quantized already, ModelError where gradients
    do not pass or are not finite.
    """
    if task is None:
        raise TaskError("prune.gradient runs the network on samples; pass a task")
    if score != "fisher" and not task.has_train:
        raise TaskError(
            f"score={score!r} needs labelled training data and the task has none; give it "
            'train=(inputs, targets), or use score="fisher"'
        )
    found = chosen(model, sparsity, include, exclude)
    twin = release_all(plain_copy(model))
    named = {site.name: site for site in walk(twin)}
    weights = [getattr(*named[site.name].uses[0]).requires_grad_(True) for site in found.sites]
    with evaluation_mode(twin), unfused(), differentiable_recurrence(twin):
        scores = _SCORES[score](twin, task, weights, samples)
    for site, values in zip(found.sites, scores, strict=True):
        if not bool(values.isfinite().all()):
            raise ModelError(
                f"gradients of {site.name!r} of shape {tuple(site.weight.shape)} are not finite; "
                "check the inputs, or leave the layer out"
            )
    prune_by(found.sites, scores, sparsity, scope)
    return model, found.outcome


def fisher(model: nn.Module, task: Task, weights: Weights, samples: int) -> Scores:
    """w^2 * mean g^2, g of answers that the network draws.

    Gradients of several drawn answers are added before they are squared: being independent, with a
    mean of zero, they add up to as much.
    """
    generator = torch.Generator().manual_seed(0)
    squares, count = [torch.zeros_like(w) for w in weights], 0
    for few in pieces(task.calibration(samples), _DRAWN):
        with torch.enable_grad():
            value = task.score(task.predict(model, few), generator)
        for square, each in zip(squares, _gradients(value, weights), strict=True):
            square += each.square()
        count += rows_in(few)
    return [w.square() * square / count for w, square in zip(weights, squares, strict=True)]


def taylor(model: nn.Module, task: Task, weights: Weights, samples: int) -> Scores:
    """|w * mean g|, g of the task's loss."""
    sums, seen = [torch.zeros_like(w) for w in weights], 0
    for gradients, count in _training(model, task, weights, samples):
        for total, each in zip(sums, gradients, strict=True):
            total += each * count
        seen += count
    return [(w * total / seen).abs() for w, total in zip(weights, sums, strict=True)]


def movement(model: nn.Module, task: Task, weights: Weights, samples: int) -> Scores:
    """-sum w * g over steps of SGD; changes the weights."""
    scores = [torch.zeros_like(w) for w in weights]
    for gradients, _ in _training(model, task, weights, samples):
        for score, weight, each in zip(scores, weights, gradients, strict=True):
            score -= weight * each
            weight -= _RATE * each
    return scores


_SCORES: dict[str, Callable[[nn.Module, Task, Weights, int], Scores]] = {
    "fisher": fisher,
    "taylor": taylor,
    "movement": movement,
}


def _training(
    model: nn.Module, task: Task, weights: Weights, samples: int
) -> Iterator[tuple[Weights, int]]:
    """Gradients of the mean loss of each training batch, and how many samples it has."""
    for inputs, targets in task.train():
        count = min(samples, rows_in(inputs))
        batch = head(inputs, count)
        with torch.enable_grad():
            loss = task.loss(task.predict(model, batch), task.targets(batch, targets[:count]))
        yield _gradients(loss, weights), count
        samples -= count
        if not samples:
            return


def _gradients(value: Tensor, weights: Weights) -> Weights:
    """Of the value in each weight, 0 where it does not depend on it."""
    if not value.requires_grad:
        raise ModelError(
            "gradients do not pass through the network, so that weights have no scores; use "
            "prune.magnitude or prune.wanda"
        )
    found = torch.autograd.grad(value, list(weights), allow_unused=True)
    return [
        torch.zeros_like(w) if each is None else each
        for w, each in zip(weights, found, strict=True)
    ]
