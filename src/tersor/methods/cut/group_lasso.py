"""Group sparsity: training drives whole units towards zero, and then the smallest are cut.

Where channels are to be cut from a network that can be trained: what `cut.channels` takes away in
one go, this empties first, everything that belongs to a unit together. What is left still wants
`distill.logits` behind it, for the penalty has made all of it smaller. Without time to train, and
to find out what a cut would cost, take `cut.channels`.

Source: Fang et al. 2023 (DepGraph), arXiv:2301.12900, section 3.3: R = sum_k gamma_k I_k with
gamma_k = 2^(a (Imax - Ik) / (Imax - Imin)) and a = 4.
Differs from the paper: units come from operators and not from layers; the original's answers are
part of the lesson; units are compared within and between groups as `cut.ranking` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import BudgetError, OptionError, TaskError
from tersor.methods.clock import Of
from tersor.methods.cut.prices import prices
from tersor.methods.cut.ranking import Ranking, chosen
from tersor.methods.cut.removing import Costs, Removable, removable
from tersor.methods.learning import learn, trainable
from tersor.methods.masking import schooling
from tersor.recipe import Outcome, method
from tersor.surgery.coupling import Group
from tersor.surgery.cut import cut
from tersor.surgery.hold import held
from tersor.surgery.proving import cuttable
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import Regime, TrainingLog

_SHARPNESS = 4.0
"""The paper's a: the smallest unit of a group is pulled on 16 times as much as the largest."""


@method
def group_lasso(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.7,
    of: Of = "macs",
    penalty: Annotated[float, Field(gt=0)] = 1e-3,
    epochs: Annotated[int, Field(ge=1)] = 10,
    rate: Annotated[float, Field(gt=0, le=1)] = 1e-3,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains the network with a penalty on whole units, and removes the smallest, in place.

    original: whose answers are learned beside labels; by default the network as it is now
    keep: share that remains, above 0 and below 1
    of: "macs", "bytes", or "latency" as measured here layer by layer
    penalty: its strength, above 0
    epochs: passes over the training data, or over the calibration inputs where there is none
    rate: the highest
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs
    include: patterns, see `walk`; groups of units that these weights write, and what is trained
    exclude: patterns; groups that none of these weights write or read

    The outcome holds what was and is spent, how many units of each group stayed, why others were
    left, and the judge's figures from before the cut. Raises TaskError without inputs, ModelError
    for a network that cannot be traced, OptionError where nothing can be cut, BudgetError where
    that is not enough.
    """
    if task is None:
        raise TaskError("cut.group_lasso needs inputs to train on; pass a task")
    for path, form in held(model):
        raise OptionError(
            f'"{path}" of shape {form.shape} is held as {form.kind}, whose size is fixed; cut '
            "first, then prune and quantize"
        )
    inputs = task.example(2)
    coupling = cuttable(model, inputs)
    groups, left = removable(model, coupling, include, exclude)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    by_tensor = prices(model, inputs, of)
    shrinking = Shrinking(groups, dict(model.named_parameters()), penalty)
    costs = Costs.of(coupling, shapes, by_tensor)
    before = costs.total
    # What cannot be reached is better known before the training.
    _smallest(groups, shrinking.sizes(), costs, keep, of)
    lessons, teacher = schooling("cut.group_lasso", model, task, original, None)
    judged = learn(
        "cut.group_lasso",
        model,
        lessons,
        teacher,
        parameters=trainable("cut.group_lasso", model, include, exclude),
        epochs=epochs,
        rate=rate,
        training=training,
        generator=generator,
        regimes=[shrinking],
        log=log,
    )
    costs = Costs.of(coupling, shapes, by_tensor)
    gone = _smallest(groups, shrinking.sizes(), costs, keep, of)
    cut(model, inputs, coupling, _units(groups, gone))
    kept = {
        group.name: f"{len(group) - len(few)} of {len(group)}"
        for group, few in zip(groups, gone, strict=True)
    }
    return model, {**judged, "before": before, "after": costs.total, "kept": kept, "left": left}


class Shrinking(Regime):
    """The penalty on groups of units.

    groups: of units; parameters: of the network, by name
    """

    def __init__(
        self, groups: Sequence[Removable], parameters: Mapping[str, Tensor], strength: float
    ) -> None:
        """Looks up once which numbers belong to each unit."""
        self._strength, self._steps, self._done = strength, 1, 0
        self._members = [_members(group.group, parameters) for group in groups]

    def sizes(self) -> list[Tensor]:
        """(units,) of each group: the sum of squares of all that belongs to a unit."""
        return [
            torch.stack([_squares(tensor, dim)[lines].sum(1) for tensor, dim, lines in members])
            .sum(0)
            for members in self._members
        ]  # fmt: skip

    def begin(self, model: nn.Module, steps: int) -> None:
        """Notes when the training is over."""
        self._steps = steps

    def penalty(self, step: int) -> Tensor:
        """Half the paper's R, so that its gradient is gamma times the weight."""
        total = torch.stack([(pull(sizes.detach()) * sizes).sum() for sizes in self.sizes()]).sum()
        return 0.5 * self._strength * total

    def after(self, step: int) -> None:
        """Counts."""
        self._done = step + 1

    @property
    def settled(self) -> bool:
        """Only the end counts: any state before has larger units, and answers better."""
        return self._done >= self._steps

    def state(self) -> dict[str, Any]:
        """How far it is."""
        return {"done": self._done}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._done = state["done"]


def pull(sizes: Tensor) -> Tensor:
    """The paper's gamma, (units,): 1 for the largest to 16 for the smallest."""
    spread = (sizes.max() - sizes.min()).clamp(min=1e-30)
    return torch.exp2(_SHARPNESS * (sizes.max() - sizes) / spread)


def _members(group: Group, parameters: Mapping[str, Tensor]) -> list[tuple[Tensor, int, Tensor]]:
    """Parameters, a dimension of each, and (units, indices) of it."""
    found = []
    for name, dim in group.places:
        if name in parameters:
            lines = torch.tensor([unit.slices[name, dim] for unit in group.units])
            found.append((parameters[name], dim, lines.to(parameters[name].device)))
    return found


def _squares(tensor: Tensor, dim: int) -> Tensor:
    """(indices of `dim`,) sums of squares."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).square().sum(1)


def _smallest(
    groups: Sequence[Removable], sizes: Sequence[Tensor], costs: Costs, keep: float, of: Of
) -> list[list[int]]:
    """Units to remove of each group. costs: are counted down"""
    before = costs.total
    rankings = [Ranking.of(those, shares=True) for those in sizes]
    steps = [1] * len(groups)
    try:
        return chosen(groups, rankings, costs, keep * before, steps=steps, by_saving=False)
    except BudgetError:
        raise BudgetError(
            f"keep={keep}: at most {1 - costs.total / before:.0%} of the {of} can be cut, with one "
            f"unit in 16 of each of the {len(groups)} groups left; keep more, or exclude less"
        ) from None


def _units(groups: Sequence[Removable], gone: Sequence[Sequence[int]]) -> list[Any]:
    return [
        group.group.units[unit] for group, few in zip(groups, gone, strict=True) for unit in few
    ]
