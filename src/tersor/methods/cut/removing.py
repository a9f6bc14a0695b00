"""What of a network can be removed: units, the weights that write and read them, and their cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.surgery.coupling import Coupling, Group, Place
from tersor.surgery.walk import Patterns, Site, walk


@dataclass(frozen=True)
class End:
    """A weight at one end of a group of units.

    lines: (units, lines of each), of `rows(weight, axis)`: rows where the weight writes the units,
        columns where it reads them
    """

    site: Site
    lines: Tensor


@dataclass(frozen=True)
class Removable:
    """Units of one kind, and the weights that write and read them.

    name: of the first weight that writes them
    """

    name: str
    group: Group
    writers: list[End]
    readers: list[End]

    def __len__(self) -> int:
        return len(self.group.units)


def removable(
    model: nn.Module, coupling: Coupling, include: Patterns, exclude: Patterns
) -> tuple[list[Removable], dict[str, str]]:
    """The groups to choose from, and why other weights keep as many outputs as they have.

    A group is chosen by the weights that write it, and left where any of its weights is excluded.
    Raises OptionError where none is left.
    """
    named = _by_tensor(model)
    chosen = {site.name for site in walk(model, include)}
    left_out = {site.name for site in walk(model)} - {s.name for s in walk(model, None, exclude)}
    found: list[Removable] = []
    left = {
        name: reason
        for (name, dim), reason in coupling.left.items()
        if name in named and dim == named[name].axis
    }
    for group in coupling.groups:
        writers, readers = _ends(group, named)
        sites = {end.site.name for end in (*writers, *readers)}
        name = writers[0].site.name if writers else group.places[0][0]
        if any(unit.mixed for unit in group.units):
            left[name] = "a norm or a mean goes over its outputs as a whole"
        elif not readers or not writers:
            left[name] = "nothing that multiplies them is known to read or write its outputs"
        elif not chosen & {end.site.name for end in writers} or sites & left_out:
            left[name] = "it was not chosen"
        else:
            found.append(Removable(name, group, writers, readers))
    if not found:
        some = "; ".join(f'"{name}": {why}' for name, why in list(left.items())[:3])
        raise OptionError(
            f"{type(model).__name__} has nothing that can be cut ({some}); exclude less, or leave "
            "this step out"
        )
    written = {end.site.name for units in found for end in units.writers}
    return found, {name: reason for name, reason in left.items() if name not in written}


def _by_tensor(model: nn.Module) -> dict[str, Site]:
    """The site of each weight, by its first name."""
    sites = {id(getattr(*site.uses[0])): site for site in walk(model)}
    return {name: sites[id(p)] for name, p in model.named_parameters() if id(p) in sites}


def _ends(group: Group, named: Mapping[str, Site]) -> tuple[list[End], list[End]]:
    writers: dict[str, End] = {}
    readers: dict[str, End] = {}
    for name, dim in group.places:
        site = named.get(name)
        if site is None:
            continue
        shape = site.weight.shape
        indices = torch.tensor([unit.slices[name, dim] for unit in group.units])
        if dim == site.axis:
            writers[name] = End(site, indices)
            continue
        rest = [n for at, n in enumerate(shape) if at != site.axis]
        numbers = torch.arange(math.prod(rest)).reshape(rest)
        along = dim if dim < site.axis else dim - 1
        readers[name] = End(
            site, torch.stack([numbers.index_select(along, few).flatten() for few in indices])
        )
    return list(writers.values()), list(readers.values())


@dataclass
class Costs:
    """What a network costs, by how many units of each group are left.

    price: of an element of each tensor; rest: of everything that no unit changes
    """

    price: Mapping[str, float]
    rest: float
    sizes: dict[str, list[int]]

    @classmethod
    def of(
        cls, coupling: Coupling, shapes: Mapping[str, Sequence[int]], by_tensor: Mapping[str, float]
    ) -> Costs:
        """by_tensor: what each tensor costs as a whole"""
        cut = {name for group in coupling.groups for name, _ in group.places} & by_tensor.keys()
        price = {name: by_tensor[name] / max(1, math.prod(shapes[name])) for name in cut}
        rest = sum(cost for name, cost in by_tensor.items() if name not in cut)
        return cls(price, rest, {name: list(shapes[name]) for name in cut})

    @property
    def total(self) -> float:
        """As it is now."""
        return self.rest + sum(p * math.prod(self.sizes[name]) for name, p in self.price.items())

    def saving(self, group: Group, count: int = 1) -> float:
        """What `count` more units less would save."""
        return sum(
            price * (math.prod(self.sizes[name]) - math.prod(sizes))
            for name, (price, sizes) in self._without(group, count).items()
        )

    def remove(self, group: Group, count: int = 1) -> None:
        """Counts them out."""
        for name, (_, sizes) in self._without(group, count).items():
            self.sizes[name] = sizes

    def _without(self, group: Group, count: int) -> dict[str, tuple[float, list[int]]]:
        found: dict[str, tuple[float, list[int]]] = {}
        lengths: dict[Place, int] = {p: len(i) for p, i in group.units[0].slices.items()}
        for (name, dim), length in lengths.items():
            if name in self.price:
                price, sizes = found.get(name, (self.price[name], list(self.sizes[name])))
                sizes[dim] -= count * length
                found[name] = price, sizes
        return found
