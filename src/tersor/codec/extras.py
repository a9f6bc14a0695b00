"""What techniques change about a network beside its tensors: grids, scalings, folded batch norms.

A file says so by the type of the module that owns a tensor: "grid u8", "folded norm". A network
rebuilt from its graph has both in the graph; a user's own module gets them put in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.codec.errors import Unreadable
from tersor.codec.header import Entry
from tersor.errors import OptionError
from tersor.forms import Form
from tersor.forms.grid import Rounding, grid_from, is_grid
from tersor.forms.scaling import Scaling
from tersor.program.program import split_name
from tersor.surgery.fold import FoldedNorm
from tersor.surgery.grids import SCALING, Where, place_of, put, put_scaling

Item = tuple[Entry, Tensor | Form]
Place = tuple[str, Where]


@dataclass(frozen=True)
class Extras:
    """What a file has.

    grids: by layer and side, a shared one in each of its places
    scalings: by layer
    folded: paths of norms
    """

    grids: dict[Place, Rounding]
    scalings: dict[str, Scaling]
    folded: frozenset[str]

    def lacking(self, model: nn.Module) -> set[str]:
        """The paths of layers that `model` must have, and has not."""
        layers = dict(model.named_modules(remove_duplicate=False))
        norms = _BatchNorm | FoldedNorm
        owners = {owner for owner, _ in self.grids} | self.scalings.keys()
        return (owners - layers.keys()) | {
            path for path in self.folded if not path or not isinstance(layers.get(path), norms)
        }

    def adapted(
        self, shapes: dict[str, tuple[int, ...]], model: nn.Module, wanted: Iterable[str]
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of a model's tensors once it has what the file has.

        wanted: the names in the file; a layer that took a norm in may have got a bias
        """
        found = {
            name: shape
            for name, shape in shapes.items()
            if split_name(name)[0] not in self.folded
            and place_of(split_name(name)[0]) not in self.grids
            and _scaled(split_name(name)[0]) not in self.scalings
        }
        layers = dict(model.named_modules(remove_duplicate=False))
        for name in wanted if self.folded else ():
            path, leaf = split_name(name)
            layer = layers.get(path)
            outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
            if leaf == "bias" and outputs and getattr(layer, "bias", 0) is None:
                found[name] = (outputs,)
        return found

    def put_into(self, model: nn.Module, where: torch.device) -> None:
        """Folds the norms away and puts the grids and scalings."""
        for path in self.folded:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, FoldedNorm().to(where))
        for path, scaling in self.scalings.items():
            put_scaling(model.get_submodule(path), scaling.to(where))
        # Inputs before outputs, as techniques do it: the order of children is that of a file.
        for (owner, side), grid in sorted(self.grids.items(), key=lambda item: item[0][1]):
            put(model.get_submodule(owner), side, grid.to(where))


def taken_out(items: Iterable[Item]) -> tuple[Extras, list[Item]]:
    """The extras of a file, and the items that are tensors of layers. Raises Unreadable."""
    grids: list[Item] = []
    scalings: dict[str, Scaling] = {}
    folded: set[str] = set()
    rest: list[Item] = []
    for entry, item in items:
        if is_grid(entry.layer):
            grids.append((entry, item))
        elif entry.layer == FoldedNorm.kind:
            if not isinstance(item, Tensor) or item.shape != (0,):
                raise Unreadable(f'the folded norm "{entry.names[0]}" has values')
            folded |= {split_name(name)[0] for name in entry.names}
        elif entry.layer == Scaling.kind:
            scalings |= dict.fromkeys(_scaled_by(entry), _scaling(entry, item))
        else:
            rest.append((entry, item))
    return Extras(_grids(grids), scalings, frozenset(folded)), rest


def _scaled(path: str) -> str | None:
    """ "fc1.input_scaling" -> "fc1"; None for any other path."""
    owner, _, child = path.rpartition(".")
    return owner if child == SCALING else None


def _sits(path: str) -> bool:
    """Whether it is the path of a grid or a scaling, on which no other one can sit."""
    return place_of(path) is not None or _scaled(path) is not None


def _scaled_by(entry: Entry) -> list[str]:
    """The layers that a scaling belongs to, which may share it. Raises Unreadable."""
    places = [split_name(name) for name in entry.names]
    owners = [_scaled(path) for path, leaf in places if leaf == "factor"]
    found = [owner for owner in owners if owner is not None and not _sits(owner)]
    if len(found) < len(places):
        raise Unreadable(f'the scaling "{entry.names[0]}" belongs to no layer')
    return found


def _scaling(entry: Entry, item: Tensor | Form) -> Scaling:
    if not isinstance(item, Tensor) or item.dim() != 1 or not item.is_floating_point():
        raise Unreadable(f'the scaling "{entry.names[0]}" is no vector of numbers')
    return Scaling(item)


def _grids(items: Iterable[Item]) -> dict[Place, Rounding]:
    parts: dict[tuple[str, ...], tuple[str, dict[str, Tensor]]] = {}
    for entry, item in items:
        paths = tuple(split_name(name)[0] for name in entry.names)
        leaves = {split_name(name)[1] for name in entry.names}
        if len(leaves) > 1 or not isinstance(item, Tensor):
            raise Unreadable(f'the grid "{paths[0]}" has other tensors than a grid has')
        parts.setdefault(paths, (entry.layer, {}))[1][leaves.pop()] = item
    found: dict[Place, Rounding] = {}
    for paths, (kind, tensors) in parts.items():
        try:
            grid = grid_from(kind, tensors)
        except (ValueError, OptionError) as error:
            raise Unreadable(f'the grid "{paths[0]}" cannot be rebuilt: {error}') from None
        for path in paths:
            place = place_of(path)
            if place is None or _sits(place[0]) or place in found:
                raise Unreadable(f'the grid "{path}" sits on no layer\'s input or output')
            found[place] = grid
    return found
