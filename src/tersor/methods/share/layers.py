"""Whole-layer sharing: blocks of equal structure use the same weights, which are stored once.

For deep networks of many alike blocks, where a recovery by training follows (`distill.logits`):
without one it costs far more than codes of equal size do. Biases and norms stay each block's own,
they are small and say most of what sets blocks apart. Multiply-adds stay as they were; to save
those as well `cut.depth` leaves blocks out.

Source: Lan et al. 2020 (ALBERT), arXiv:1909.11942, section 3.1, for weights shared across blocks;
Takase, Kiyono 2023, "Lessons on parameter sharing across layers in transformers",
arXiv:2104.06022, section 3, for sharing among some of them.
Differs from the papers: the network is trained already, and which blocks share is measured; two
take the weights of one of them or their mean, whichever moves the answers least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.measure import divergence_of, reference_outputs
from tersor.recipe import Outcome, method
from tersor.surgery.hold import bake
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Inputs, Task


@method
def layers(
    model: nn.Module,
    task: Task | None = None,
    *,
    size: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    samples: Annotated[int, Field(ge=1)] = 256,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Ties weights of blocks in the same list whose weights have the same shapes, in place.

    size: share of the bytes of those weights that may remain, above 0 and below 1
    samples: calibration inputs that choices are measured on, at most
    include, exclude: patterns on names and types of the weights to tie, see `walk`

    The outcome holds the names of the blocks that share, the share of bytes that remains, and the
    divergence from the network as it was. Raises TaskError without data, OptionError where no two
    blocks are alike, where even one block of each kind is more than `size`, or for a weight that is
    pruned or quantized already.
    """
    if task is None:
        raise TaskError("share.layers needs inputs to run the network on; pass a task")
    groups = alike(model, walk(model, include, exclude))
    _check(model, groups, size)
    for block in (block for group in groups for block in group):
        for site in block.sites:
            for layer, attribute in site.uses:
                bake(layer, attribute)
    batches = task.calibration(samples)
    trial = _Trial(model, task, batches, reference_outputs(model, task, batches))
    classes, divergence = chosen(trial, groups, size)
    for each in classes:
        _tie(each)
    left = sum(each[0].size for each in classes) / _bytes(groups)
    return model, {
        "shared": [[block.name for block in each] for each in classes if len(each) > 1],
        "size": left,
        "divergence": divergence,
    }


@dataclass(frozen=True)
class Block:
    """A module of a list, with the weights that only it uses, in the order of their names.

    shapes: what another one must have as well
    """

    name: str
    sites: tuple[Site, ...]
    shapes: tuple[object, ...]

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(site.weight.numel() * site.weight.element_size() for site in self.sites)

    def weights(self) -> list[Tensor]:
        """Copies of what it has now."""
        return [site.weight.clone() for site in self.sites]

    def put(self, weights: Sequence[Tensor]) -> None:
        """Gives it others."""
        with torch.no_grad():
            for site, weight in zip(self.sites, weights, strict=True):
                site.weight.copy_(weight)


def alike(model: nn.Module, sites: Sequence[Site]) -> list[list[Block]]:
    """Blocks of the outermost lists that may share, two or more in a group.

    Of one type, with weights of the same names and shapes, each of which only one block uses.
    """
    groups: list[list[Block]] = []
    inside: set[int] = set()
    for path, parent in model.named_modules():
        if id(parent) in inside or not isinstance(parent, nn.ModuleList | nn.Sequential):
            continue
        found: dict[tuple[object, ...], list[Block]] = {}
        for name, child in parent.named_children():
            block = _block(f"{path}.{name}".removeprefix("."), child, sites)
            if block.sites:
                found.setdefault(block.shapes, []).append(block)
        for group in (group for group in found.values() if len(group) > 1):
            groups.append(group)
            for block in group:
                inside |= {id(module) for module in model.get_submodule(block.name).modules()}
    return groups


def _block(name: str, module: nn.Module, sites: Sequence[Site]) -> Block:
    places = {layer: path for path, layer in module.named_modules()}
    own: dict[str, Site] = {}
    for site in sites:
        if all(layer in places for layer, _ in site.uses):
            layer, attribute = site.uses[0]
            own[f"{places[layer]}.{attribute}"] = site
    names = sorted(own)
    shapes = tuple((each, tuple(own[each].weight.shape), own[each].weight.dtype) for each in names)
    return Block(name, tuple(own[each] for each in names), (type(module), shapes))


def _check(model: nn.Module, groups: Sequence[Sequence[Block]], size: float) -> None:
    if not groups:
        raise OptionError(
            f"{type(model).__name__} has no two blocks in one ModuleList or Sequential whose "
            "weights have the same shapes and are not shared yet; there is nothing to tie"
        )
    for block in (block for group in groups for block in group):
        for site in block.sites:
            if site.form is not None:
                raise OptionError(
                    f'"{site.name}" of shape {tuple(site.weight.shape)} is held as '
                    f"{site.form.kind}, and two forms cannot be compared; tie layers first, or "
                    f'leave it out with exclude="{site.name}"'
                )
    least = sum(group[0].size for group in groups) / _bytes(groups)
    if size < least:
        raise OptionError(
            f"size={size} is below the {least:.3g} that one block of each of the {len(groups)} "
            "kinds takes; allow more, or cut blocks with cut.depth"
        )


def _bytes(groups: Sequence[Sequence[Block]]) -> int:
    return sum(block.size for group in groups for block in group)


@dataclass(frozen=True)
class _Trial:
    """A network, and how far it is from its own answers at the start."""

    model: nn.Module
    task: Task
    batches: Sequence[Inputs]
    wanted: Sequence[Tensor]

    def best(self, one: Sequence[Block], other: Sequence[Block]) -> tuple[float, list[Tensor]]:
        """The least divergence if both use the same weights, and those weights.

        Those of either, or their mean with each block counted once. The network stays as it is.
        """
        first, second = one[0].weights(), other[0].weights()
        share = len(other) / (len(one) + len(other))
        mean = [torch.lerp(a, b, share) for a, b in zip(first, second, strict=True)]
        tried = []
        for weights in (first, second, mean):
            for block in (*one, *other):
                block.put(weights)
            found = divergence_of(self.model, self.task, self.batches, self.wanted)
            tried.append((found, weights))
        for blocks, weights in ((one, first), (other, second)):
            for block in blocks:
                block.put(weights)
        return min(tried, key=lambda each: each[0])


def chosen(
    trial: _Trial, groups: Sequence[Sequence[Block]], size: float
) -> tuple[list[list[Block]], float]:
    """Blocks that share, and the divergence then; their weights are equal at the end.

    Every pair is tried alone. Then the classes whose worst pair costs least for each byte that is
    saved are joined, one after the other, until few enough remain.
    """
    alone = {
        (one.name, other.name): trial.best([one], [other])[0]
        for group in groups
        for one, other in combinations(group, 2)
    }
    classes = [[[block] for block in group] for group in groups]
    # Of whole bytes: 1/49 of 49 blocks is one block, whatever the product of floats says.
    allowed, divergence = math.ceil(size * _bytes(groups) - 1e-6), 0.0
    while sum(each[0].size for group in classes for each in group) > allowed:
        _, place, (one, other) = min(_joinable(classes, alone), key=lambda each: each[0])
        divergence, weights = trial.best(one, other)
        joined = sorted([*one, *other], key=groups[place].index)
        for block in joined:
            block.put(weights)
        kept = [each for each in classes[place] if each is not one and each is not other]
        classes[place] = [*kept, joined]
    return [each for group in classes for each in group], divergence


def _joinable(
    classes: Sequence[Sequence[list[Block]]], alone: dict[tuple[str, str], float]
) -> Iterator[tuple[float, int, tuple[list[Block], list[Block]]]]:
    """What every two classes cost for each byte that joining them saves; where; and the two."""
    for place, group in enumerate(classes):
        for one, other in combinations(group, 2):
            pairs = [(a.name, b.name) for a in one for b in other]
            worst = max(alone[p] if p in alone else alone[p[::-1]] for p in pairs)
            yield worst / one[0].size, place, (one, other)


def _tie(blocks: Sequence[Block]) -> None:
    """Lets all of them use the parameters of the first."""
    first, *others = blocks
    for number, site in enumerate(first.sites):
        parameter = getattr(*site.uses[0])
        for other in others:
            for layer, attribute in other.sites[number].uses:
                setattr(layer, attribute, parameter)
