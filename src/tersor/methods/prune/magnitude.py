"""Magnitude pruning: the smallest weights become zero, only the others are stored. No data needed.

The baseline of pruning. Without retraining it costs little up to about 20-30 %; the mask takes a
bit per weight back, so that `quantize.rtn` alone usually buys more for the same loss. With a few
hundred inputs at hand `prune.sparsegpt` and `prune.obs` lose less. Zeros in any place make no
network faster by themselves; 2:4 is what sparse tensor cores execute.

Source: Han et al. 2015, arXiv:1506.02626, section 3 (threshold per layer); Zhu and Gupta 2017,
arXiv:1710.01878, section 3 (the threshold that gives an exact sparsity); Mishra et al. 2021,
arXiv:2104.08378, section 3 (n of every m).
Differs from the papers: one shot, without retraining between steps; ties go by place.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from tersor.methods.masks import Sparsity, chosen, prune_by
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task


@method
def magnitude(
    model: nn.Module,
    task: Task | None = None,
    *,
    sparsity: Sparsity = 0.5,
    scope: Literal["layer", "global"] = "layer",
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Sets the smallest weights to zero and stores the rest under a bitmask, in place.

    sparsity: fraction of the weights that become zero, above 0 and below 1; or a pattern such as
        "2:4", for 2 of every 4 neighbouring inputs that stay
    scope: "layer" removes the same fraction of each; "global" compares all chosen weights with each
        other, so that layers with small weights lose more: better for networks with batch norm. A
        pattern keeps as many of each in either case
    include, exclude: patterns on names and types, see `walk`

    Removes exactly round(sparsity * n) of n weights; zeros that were there already count. A pattern
    leaves layers alone whose inputs m does not divide; the step's outcome names them. Raises
    OptionError for a layer that would lose all its weights, or that is quantized already.
    """
    found = chosen(model, sparsity, include, exclude)
    prune_by(found.sites, [site.weight.abs() for site in found.sites], sparsity, scope)
    return model, found.outcome
