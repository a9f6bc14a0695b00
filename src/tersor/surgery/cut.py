"""Cutting: weights really lose the slices of units, and layers learn their new sizes.

The network keeps its class and its forward pass; see `settling` for sizes that its own modules
remember, such as a number of heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.surgery.coupling import Coupling, Labelled, Place, Unit
from tersor.surgery.hold import held
from tersor.surgery.settling import changed_numbers, memories_of, settled
from tersor.surgery.structure import Structure, note, resize
from tersor.task import Inputs, placed


def cut(model: nn.Module, inputs: Inputs, coupling: Coupling, units: Sequence[Unit]) -> nn.Module:
    """Removes units, in place; nothing is changed where it fails.

    inputs: one batch to run and trace the network with; coupling: of this network; units: of its
    groups, not all of any. Raises ModelError where nothing of a dimension would be left, where
    weights are held by forms, and where the network does not run without the units.
    """
    for path, _ in held(model):
        raise ModelError(f'"{path}" is held by a form, which has a fixed shape; cut first')
    inputs, gone = placed(model, inputs), _gone(units)
    _check(model, gone)
    before = {name: (tensor.data, tensor.grad) for name, tensor in _tensors(model)}
    lost = _gone_ids(coupling, gone)
    wanted = [(n, _kept_shape(value, coupling, lost)) for n, value in coupling.steps]
    settings = [
        {k: v for k, v in vars(module).items() if isinstance(v, int | tuple | list)}
        for module in model.modules()
    ]
    try:
        for name, tensor in _tensors(model):
            tensor.data, tensor.grad = _kept(name, tensor.data, gone), None
        for module in model.modules():
            resize(module)
        memories = memories_of(model, coupling, wanted)
        reason = settled(model, inputs, memories, wanted)
        if reason:
            raise ModelError(
                f"{type(model).__name__} does not run once it is cut: {reason}; leave these units "
                "alone"
            )
    except BaseException:
        for name, tensor in _tensors(model):
            tensor.data, tensor.grad = before[name]
        for module, saved in zip(model.modules(), settings, strict=True):
            module.__dict__.update(saved)
        raise
    note(model, Structure(cut=True, numbers=changed_numbers(model, memories)))
    return model


def _gone(units: Sequence[Unit]) -> dict[Place, set[int]]:
    found: dict[Place, set[int]] = defaultdict(set)
    for unit in units:
        for place, indices in unit.slices.items():
            found[place].update(indices)
    return found


def _check(model: nn.Module, gone: Mapping[Place, set[int]]) -> None:
    shapes = {name: tensor.shape for name, tensor in _tensors(model)}
    for (name, dim), indices in gone.items():
        if len(indices) >= shapes[name][dim]:
            raise ModelError(
                f'nothing would be left of "{name}" of shape {tuple(shapes[name])} along dimension '
                f"{dim}; keep at least one unit of each group"
            )


def _gone_ids(coupling: Coupling, gone: Mapping[Place, set[int]]) -> set[int]:
    """Numbers of the units that are removed."""
    return {
        coupling.units.root(int(coupling.places[place][index]))
        for place, indices in gone.items()
        for index in indices
    }


def _kept_shape(value: Any, coupling: Coupling, gone: set[int]) -> Any:
    """The shape of a labelled tensor once these units are gone; lists of them for lists."""
    if isinstance(value, list):
        return [_kept_shape(v, coupling, gone) for v in value]
    if not isinstance(value, Labelled) or not value.blocks:
        return None
    shape = list(value.shape)
    for block in value.blocks:
        kept = ~np.isin(coupling.units.roots(block.ids), list(gone))
        for axis, dim in enumerate(block.dims):
            others = tuple(a for a in range(kept.ndim) if a != axis)
            shape[dim] = int(kept.any(others).sum())
    return tuple(shape)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _kept(name: str, tensor: Tensor, gone: Mapping[Place, set[int]]) -> Tensor:
    for dim in range(tensor.dim()):
        lost = gone.get((name, dim))
        if lost:
            left = [i for i in range(tensor.shape[dim]) if i not in lost]
            tensor = tensor.index_select(dim, torch.tensor(left, device=tensor.device))
    return tensor.contiguous()
