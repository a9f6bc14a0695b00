"""L0 regularization: each weight, or each row of a layer, has a gate that learns whether to close.

Where it should be learned how much each layer loses: one goal for all of them, and gates that close
where the loss minds least. With `unit="row"` whole outputs go, which a later cut of shapes or a
runtime can make use of. It sees noise while gates are undecided, and wants more epochs than
`prune.gradual`, which is the simpler choice for single weights.

Source: Louizos, Welling, Kingma 2018, arXiv:1712.01312, eqs. 10-13 (gates), 9 and 12 (penalty);
Xia, Zhong, Chen 2022 (CoFi), arXiv:2204.00408, section 3.1, for steering to a sparsity.
Differs from the papers: the penalty's strength is not chosen but rises until the sparsity is
reached; after 0.6 of the steps gates become masks, the most closed ones exactly as many as asked
for, and what is left is trained on without noise; gates belong to weights or rows of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from tersor.forms import HardConcrete
from tersor.methods.gating import START, Gating, gated
from tersor.methods.learning import learn, trainable
from tersor.methods.masking import check_precision, check_room, freeze, masked, schooling
from tersor.methods.masks import chosen
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns, Site
from tersor.task import Task
from tersor.train import TrainingLog


@method
def l0(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.8,
    unit: Literal["weight", "row"] = "weight",
    epochs: Annotated[int, Field(ge=1)] = 20,
    rate: Annotated[float, Field(gt=0, le=1)] = 1e-3,
    labels: Annotated[float, Field(ge=0, le=1)] | None = None,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains the network while gates close, and stores what is left under a bitmask, in place.

    original: whose answers are learned and judge; by default the network as it is now
    sparsity: fraction of all chosen weights that become zero, above 0 and below 1
    unit: what has a gate, a "weight" or a "row": all weights of one output of a layer
    epochs: passes over the training data, or over the calibration inputs where there is none
    rate: the highest, of weights; that of gates follows from the number of steps
    labels: share of the task's own loss, 0 to 1, beside that of the original's answers; by default
        half where there are labels. With 1 there is no teacher
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs, and the noise of gates
    include, exclude: patterns on names and types, see `walk`; other layers are not trained either

    Removes exactly round(sparsity * n) of all n weights, or as many whole rows as that allows. The
    step's outcome has the sparsity that came out, and `closed`: the one that gates had come to by
    themselves when they were cut to it. Raises what `prune.gradual` does, and OptionError for
    float16. After an error all is as it was.
    """
    check_precision("prune.l0", training)
    found = chosen(model, sparsity, include, exclude)
    check_room(found.sites, sparsity, "global")
    lessons, teacher = schooling("prune.l0", model, task, original, labels)
    order = generator or torch.Generator().manual_seed(0)
    draws = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=order)))

    def make(site: Site) -> HardConcrete:
        axis = site.axis if unit == "row" else None
        return HardConcrete.encode(site.weight, start=START, axis=axis, generator=draws)

    with masked(model, found.sites, make):
        gating = Gating(found.sites, sparsity, draws)
        gates = {id(gated(site).openness) for site in found.sites}
        every = trainable("prune.l0", model, include, exclude)
        outcome = learn(
            "prune.l0",
            model,
            lessons,
            teacher,
            parameters=[parameter for parameter in every if id(parameter) not in gates],
            epochs=epochs,
            rate=rate,
            training=training,
            generator=order,
            regimes=[gating],
            log=log,
        )
    freeze(found.sites, sparsity)
    zeros = sum(int((site.weight == 0).sum()) for site in found.sites)
    size = sum(site.weight.numel() for site in found.sites)
    return model, {**outcome, "sparsity": zeros / size, "closed": gating.reached}
