"""Proving that units can be cut: trials on copies, and what fails in one is left alone.

A trial cuts some units of every group. The network must then run with the sizes it should have, and
answer as it does with the weights of those units set to zero.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.errors import ModelError
from tersor.surgery.coupling import Coupling, Group, Place, Unit, couple
from tersor.surgery.cut import cut
from tersor.task import Inputs, call, evaluation_mode, placed

_SHARE = 0.4
"""Of the units of a group, drawn by lot."""
_NEAR, _NEAR_HALF = 1e-3, 0.1
"""How far answers may be apart, as a share of the largest; of networks in 16 bits more."""

Draw = tuple[Group, list[Unit]]


def cuttable(model: nn.Module, inputs: Inputs) -> Coupling:
    """The groups of which units were cut, and the network then did what it should.

    Others, such as those whose number stands in the code of a forward pass, are left with the
    reason. Answers are not compared for units that a norm or a mean goes over, which sees the
    others differently without them. inputs: one batch. Raises ModelError for a network that cannot
    be traced.
    """
    inputs = placed(model, inputs)
    coupling, lots = couple(model, inputs), random.Random(0)
    groups, left = list(coupling.groups), dict(coupling.left)
    drawn = [(group, _some(group, lots)) for group in groups]
    for mixed in (False, True):
        alike = [draw for draw in drawn if any(u.mixed for u in draw[0].units) is mixed]
        for group, reason in _Trial(model, inputs, coupling, not mixed).failing(alike):
            left |= dict.fromkeys(group.places, reason)
            groups.remove(group)
    return replace(coupling, groups=groups, left=left)


def _some(group: Group, lots: random.Random) -> list[Unit]:
    return lots.sample(group.units, max(1, int(_SHARE * len(group.units))))


@dataclass(frozen=True)
class _Trial:
    """answers: whether they are compared too"""

    model: nn.Module
    inputs: Inputs
    coupling: Coupling
    answers: bool

    def failing(self, drawn: Sequence[Draw]) -> list[tuple[Group, str]]:
        """Half by half, until those that fail stand alone."""
        if not drawn or not (reason := self._failure([u for _, units in drawn for u in units])):
            return []
        if len(drawn) == 1:
            return [(drawn[0][0], reason)]
        half = len(drawn) // 2
        return [*self.failing(drawn[:half]), *self.failing(drawn[half:])]

    def _failure(self, units: Sequence[Unit]) -> str:
        """Why the network cannot do without these units, empty if it can."""
        small = copy.deepcopy(self.model)
        try:
            cut(small, self.inputs, self.coupling, units)
        except ModelError as error:
            return str(error)
        if self.answers and self._differs(small, _zeroed(self.model, units)):
            return "the network computes something else without some of these units"
        return ""

    def _differs(self, small: nn.Module, zeroed: nn.Module) -> bool:
        for found, wanted in zip(self._said(small), self._said(zeroed), strict=True):
            if found.shape != wanted.shape:
                return True
            near = _NEAR if wanted.dtype in (torch.float32, torch.float64) else _NEAR_HALF
            most = near * float(wanted.abs().max()) if wanted.numel() else 0.0
            # Where zeros give no numbers, as behind a division, nothing is said.
            if bool(wanted.isfinite().all()) and bool(((found - wanted).abs() > most).any()):
                return True
        return False

    def _said(self, model: nn.Module) -> list[Tensor]:
        with evaluation_mode(model):
            leaves = tree_leaves(call(model, self.inputs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _zeroed(model: nn.Module, units: Sequence[Unit]) -> nn.Module:
    """A copy in which the weights of these units are zero."""
    zeroed = copy.deepcopy(model)
    tensors: dict[str, Tensor] = dict(zeroed.named_parameters(remove_duplicate=False))
    tensors |= dict(zeroed.named_buffers(remove_duplicate=False))
    lost: dict[Place, set[int]] = {}
    for unit in units:
        for place, few in unit.slices.items():
            lost.setdefault(place, set()).update(few)
    with torch.no_grad():
        for (name, dim), indices in lost.items():
            where = torch.tensor(sorted(indices), device=tensors[name].device)
            tensors[name].index_fill_(dim, where, 0)
    return zeroed
