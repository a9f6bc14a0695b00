"""Permuting channels so that n:m pruning keeps more; the network computes the same.

Which inputs are neighbours is an accident: channels that all matter may share a group of four, of
which two must go. Here channels change places, in every weight, norm and sum that they pass
through, so that the large weights are spread evenly. Put it before any pruning with the same
pattern: the file is no larger and nothing is slower. Gains nothing for pruning by a share, and
little for `prune.wanda`, which asks for more than size.

Source: Pool, Yu 2021, "Channel permutations for N:M sparsity", NeurIPS 34, for the greedy exchange
of columns by the magnitude that is kept.
Differs from the paper: all exchanges that do not touch each other are made in one round, without
random ones to leave a local optimum; what must move along is read from the network's graph.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.forms.form import rows
from tersor.methods.masks import Pattern, pattern_of
from tersor.methods.rescaling import TOLERANCE, Unchanged
from tersor.recipe import Outcome, method
from tersor.surgery.coupling import Group, couple
from tersor.surgery.hold import held
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task

_WORTH = 1e-6
"""Of what is kept: the least that an exchange must gain."""


@method
def permute(
    model: nn.Module,
    task: Task | None = None,
    *,
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] = "2:4",
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Puts channels in the order in which n:m pruning keeps most, in place; outputs stay.

    pattern: that of the pruning to come, "n:m": of every m neighbouring inputs n stay
    include, exclude: patterns on names and types, see `walk`; all weights that a channel passes
        through must be chosen

    The step's outcome holds how many kinds of channels were permuted, the share of the sum of all
    |weight| that pruning by magnitude keeps before and after, and the relative change of the
    outputs. Raises OptionError where no channel is free to move, TaskError without a task,
    ModelError for a network that cannot be traced.
    """
    if task is None:
        raise TaskError("transform.permute traces the network on an example; pass a task")
    goal = pattern_of(pattern, "pattern")
    for path, _ in held(model):
        raise OptionError(f'"{path}" is held by a form already; permute the plain network')
    sites = {site.name: site for site in walk(model, include, exclude)}
    fixed = {site.name for site in walk(model)} - sites.keys()
    groups = [
        group
        for group in couple(model, task.example(2)).groups
        if _is_free(group, fixed) and _readers(group, sites, goal)
    ]
    if not groups:
        raise OptionError(
            f"{type(model).__name__} has no channels that may change places before a weight whose "
            f"inputs {goal.m} divides, so there is nothing to permute; leave this step out"
        )
    unchanged = Unchanged(model, task)
    read = {r.site.name: r.site for group in groups for r in _readers(group, sites, goal)}
    before, permuted = _kept(read.values(), goal), 0
    for group in groups:
        units = exchanged(_readers(group, sites, goal), goal)
        permuted += _rearranged(model, group, units, unchanged)
    outcome = {
        "permuted": permuted,
        "kept_before": before,
        "kept_after": _kept(read.values(), goal),
    }
    return model, {**outcome, "error": unchanged.check("transform.permute")}


def _is_free(group: Group, fixed: set[str]) -> bool:
    """Whether none of its weights must stay, and units lie in one piece wherever they are."""
    whole = all(
        indices == tuple(range(indices[0], indices[0] + len(indices)))
        for unit in group.units
        for indices in unit.slices.values()
    )
    return whole and not any(name in fixed for name, _ in group.places)


@dataclass
class Reader:
    """A weight that reads what the units of a group give.

    sizes: |weight|, (outputs, inputs), on the CPU, where so many small steps are quicker
    starts: where the inputs that belong to each unit begin
    span: how many there are
    """

    site: Site
    sizes: Tensor
    starts: list[int]
    span: int

    def groups_of(self, slot: int, m: int) -> range:
        """The groups of m that the inputs of a unit lie in."""
        start = self.starts[slot]
        return range(start // m, (start + self.span - 1) // m + 1)

    def exchange(self, one: int, other: int) -> None:
        """Two units change places."""
        first, second = (slice(s, s + self.span) for s in (self.starts[one], self.starts[other]))
        self.sizes[:, first], self.sizes[:, second] = (
            self.sizes[:, second].clone(),
            self.sizes[:, first].clone(),
        )


def _readers(group: Group, sites: Mapping[str, Site], pattern: Pattern) -> list[Reader]:
    found = []
    for name, dim in group.places:
        site = sites.get(name)
        if site is None or dim != (1 if site.axis == 0 else 0):
            continue
        sizes = rows(site.weight, site.axis).abs().float().cpu()
        if sizes.shape[1] % pattern.m:
            continue
        # Of a convolution, all inputs that one channel brings.
        inner = sizes.shape[1] // site.weight.shape[dim]
        slices = [unit.slices[name, dim] for unit in group.units]
        starts = [indices[0] * inner for indices in slices]
        found.append(Reader(site, sizes, starts, len(slices[0]) * inner))
    return found


def exchanged(readers: Sequence[Reader], pattern: Pattern) -> list[int]:
    """For each place the unit that comes there, so that no exchange of two would keep more.

    The sizes of the readers change places too.
    """
    units, near = list(range(len(readers[0].starts))), _near(readers, pattern.m)
    while True:
        kept = torch.stack([_kept_with(reader, pattern) for reader in readers]).sum(0)
        own = kept.diagonal()
        # Of two that share a group, neither gains what it would alone.
        gains = (kept + kept.T - own[:, None] - own).masked_fill(near, 0).triu()
        better = (gains > _WORTH * own.sum()).nonzero()
        order = gains[better[:, 0], better[:, 1]].argsort(descending=True, stable=True)
        free = torch.ones(len(units), dtype=torch.bool)
        for one, other in better[order].tolist():
            if free[one] and free[other]:
                free &= ~(near[one] | near[other])
                units[one], units[other] = units[other], units[one]
                for reader in readers:
                    reader.exchange(one, other)
        if not len(better):
            return units


def _near(readers: Sequence[Reader], m: int) -> Tensor:
    """(places, places) bool, whether two share a group anywhere."""
    found = []
    for reader in readers:
        member = torch.zeros(len(reader.starts), reader.sizes.shape[1] // m)
        for place in range(len(reader.starts)):
            member[place, reader.groups_of(place, m)] = 1
        found.append(member @ member.T > 0)
    return torch.stack(found).any(0)


def _kept_with(reader: Reader, pattern: Pattern) -> Tensor:
    """(places, units): what is kept in the groups of each place, were each unit there."""
    sizes, m = reader.sizes, pattern.m
    inputs = torch.tensor(reader.starts)[:, None] + torch.arange(reader.span)
    units = sizes[:, inputs]
    known: dict[tuple[int, int], Tensor] = {}
    found = torch.zeros(len(inputs), len(inputs), dtype=torch.float64)
    for place, start in enumerate(reader.starts):
        for group in reader.groups_of(place, m):
            low, high = max(start, group * m), min(start + reader.span, (group + 1) * m)
            part = low - start, high - start
            if part not in known:
                known[part] = _tops(units[:, :, slice(*part)])
            others = torch.cat((sizes[:, group * m : low], sizes[:, high : (group + 1) * m]), 1)
            found[place] += _together(known[part], _tops(others)[:, None], pattern.n)
    return found


def _tops(values: Tensor) -> Tensor:
    """Sums of the 0, 1, 2, ... largest along the last dimension."""
    sums = values.sort(dim=-1, descending=True).values.cumsum(-1)
    return torch.cat((sums.new_zeros(*sums.shape[:-1], 1), sums), -1)


def _together(first: Tensor, second: Tensor, n: int) -> Tensor:
    """Sums over the rows of the n largest of two sets together, given the `_tops` of both."""
    shares = range(max(0, n + 1 - second.shape[-1]), min(n, first.shape[-1] - 1) + 1)
    both = torch.stack([first[..., k] + second[..., n - k] for k in shares])
    return both.amax(0).sum(0, dtype=torch.float64)


def _rearranged(model: nn.Module, group: Group, units: Sequence[int], unchanged: Unchanged) -> bool:
    """Brings units to their new places, in all weights; not where that changes an output."""
    if list(units) == sorted(units):
        return False
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensors[name].detach().clone() for name, _ in group.places}
    with torch.no_grad():
        for place in group.places:
            tensor, dim = tensors[place[0]], place[1]
            index = torch.arange(tensor.shape[dim])
            for here, unit in zip(group.units, units, strict=True):
                index[list(here.slices[place])] = torch.tensor(group.units[unit].slices[place])
            tensor.copy_(tensor.index_select(dim, index.to(tensor.device)))
        if unchanged.error() <= TOLERANCE:
            return True
        for name, values in before.items():
            tensors[name].copy_(values)
    return False


def _kept(sites: Collection[Site], pattern: Pattern) -> float:
    """Share of the sum of |weight| that the pattern keeps."""
    kept = total = 0.0
    for site in sites:
        matrix = rows(site.weight, site.axis).abs().double()
        groups = matrix.reshape(len(matrix), -1, pattern.m)
        kept += float(groups.topk(pattern.n, dim=-1).values.sum())
        total += float(groups.sum())
    return kept / max(total, 1e-30)
