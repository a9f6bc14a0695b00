"""Proving that units can be cut: a trial on a copy, and what fails in it is left alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from tersor.errors import ModelError
from tersor.surgery.coupling import Coupling, Group, Place, couple
from tersor.surgery.cut import cut
from tersor.task import Inputs


def cuttable(model: nn.Module, inputs: Inputs) -> Coupling:
    """The groups of which a unit was cut, and the network then ran with the sizes it should have.

    Others, such as those whose number stands in the code of a forward pass, are left with the
    reason. inputs: one batch. Raises ModelError for a network that cannot be traced.
    """
    coupling = couple(model, inputs)
    failed = _failing(model, inputs, coupling, coupling.groups)
    left: dict[Place, str] = {}
    for group, reason in failed:
        left |= dict.fromkeys(group.places, reason)
    gone = [group for group, _ in failed]
    groups = [group for group in coupling.groups if group not in gone]
    return replace(coupling, groups=groups, left=coupling.left | left)


def _failing(
    model: nn.Module, inputs: Inputs, coupling: Coupling, groups: Sequence[Group]
) -> list[tuple[Group, str]]:
    """Half by half, until those that fail stand alone."""
    if not groups:
        return []
    try:
        cut(copy.deepcopy(model), inputs, coupling, [group.units[-1] for group in groups])
    except ModelError as error:
        if len(groups) == 1:
            return [(groups[0], str(error))]
        half = len(groups) // 2
        return [
            found
            for part in (groups[:half], groups[half:])
            for found in _failing(model, inputs, coupling, part)
        ]
    return []
