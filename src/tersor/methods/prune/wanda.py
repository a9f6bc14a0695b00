"""Wanda: the weights that add least to their outputs become zero, the others stay as they are.

A weight counts by its size times the size of what it is multiplied with. About as quick as running
the calibration inputs once. For large transformers, where a few inputs have most of the energy; not
for convolutional networks, whose outputs do not stand the same share each. Nothing makes up for
what is removed: `prune.sparsegpt` moves the other weights and loses less, or put `recover.polish`
behind this.

Source: Sun, Liu, Bair, Kolter 2023 (Wanda), arXiv:2306.11695, eq. 1 and algorithm 1.
Differs from the paper: layers are pruned one at a time and not block by block, each for the inputs
that the pruned layers before it give.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from tersor.methods.columns import Problem
from tersor.methods.masks import Sparsity, Wanted, best_of_rows, prune_layers
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task


@method
def wanda(
    model: nn.Module,
    task: Task | None = None,
    *,
    sparsity: Sparsity = 0.5,
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Sets the same fraction of each output's weights to zero, in place.

    sparsity: fraction of an output's weights that become zero, above 0 and below 1; or a pattern
        such as "2:4", for 2 of every 4 neighbouring inputs that stay
    samples: calibration inputs to use, at most
    include, exclude: patterns on names and types, see `walk`

    Removes round(sparsity * n) of each output's n weights; zeros that were there already go first.
    A pattern leaves layers alone whose inputs m does not divide; the step's outcome names them.
    Raises TaskError without data, OptionError for a layer that would lose all its weights or that
    is quantized already, ModelError for inputs of a layer that are not finite.
    """
    outcome = prune_layers(
        "prune.wanda",
        model,
        task,
        smallest_removed,
        sparsity=sparsity,
        samples=samples,
        sites=(include, exclude),
        by_row=True,
    )
    return model, outcome


def smallest_removed(problem: Problem, goal: Wanted) -> Tensor:
    """The target without its smallest |weight| * root mean square of the input, row by row."""
    scores = problem.target.abs() * problem.metric.own.diagonal().sqrt()
    return problem.target.masked_fill(~best_of_rows(scores, goal), 0)
