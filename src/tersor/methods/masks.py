"""Which weights stay when others become zero: all but a share, or n of every m neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.forms import Bitmask, Dense, Form, NofM
from tersor.forms.form import rows, unrows
from tersor.methods.calibrated import problems
from tersor.methods.columns import Problem
from tersor.methods.layerwise import Layer, layerwise
from tersor.methods.sparse import check_uncoded, sparse_form
from tersor.recipe import Outcome
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task

Sparsity = (
    Annotated[float, Field(gt=0, lt=1)] | Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")]
)
"""The share of weights that become zero, or "n:m": of every m neighbouring inputs n stay."""


@dataclass(frozen=True)
class Pattern:
    """Of every m neighbouring inputs n stay. Neighbours as `NofM` has them."""

    n: int
    m: int


Wanted = float | Pattern
"""The share of weights that become zero, or a pattern."""
Choose = Callable[[Problem, Wanted], Tensor]
"""The weight (outputs, inputs) that a problem's target becomes."""
Shares = Callable[[Task, Sequence[Site], float], Mapping[str, float]]
"""What part of its weights each layer is to lose, by name, for a share of all."""


def wanted(sparsity: Sparsity) -> Wanted:
    """What the option asks for. Raises OptionError for a pattern that no form can store."""
    return pattern_of(sparsity, "sparsity") if isinstance(sparsity, str) else sparsity


def pattern_of(text: str, option: str) -> Pattern:
    """The pattern "n:m". option: it comes from. Raises OptionError for one that cannot be."""
    n, m = (int(part) for part in text.split(":"))
    if not n < m <= 256:
        raise OptionError(
            f"{option}={text!r} keeps {n} of every {m} weights, but n < m <= 256 must hold; use "
            'for example "2:4"'
        )
    return Pattern(n, m)


@dataclass(frozen=True)
class Chosen:
    """Weights to prune.

    left: those that the pattern does not fit, by name, with the reason
    """

    sites: list[Site]
    left: dict[str, str]

    @property
    def outcome(self) -> Outcome:
        """What was left, if anything was."""
        return {"left": self.left} if self.left else {}


def chosen(model: nn.Module, sparsity: Sparsity, include: Patterns, exclude: Patterns) -> Chosen:
    """The weights that match. Raises OptionError for coded ones, and where a pattern fits none."""
    sites = walk(model, include, exclude)
    for site in sites:
        forms = list(site.form.forms()) if site.form is not None else []
        if not all(isinstance(form, Bitmask | NofM | Dense) for form in forms):
            raise OptionError(
                f"{site.name!r} of shape {tuple(site.weight.shape)} is stored as {forms[0].kind}; "
                f"pruning would give its codes up. Prune first, or leave it out with "
                f'exclude="{site.name}"'
            )
    goal = wanted(sparsity)
    if isinstance(goal, float):
        return Chosen(sites, {})
    inputs = {site.name: site.weight.numel() // site.weight.shape[site.axis] for site in sites}
    left = {
        name: f"{goal.m} does not divide its {count} inputs"
        for name, count in inputs.items()
        if count % goal.m
    }
    if len(left) == len(sites):
        first = sites[0]
        raise OptionError(
            f"sparsity={sparsity!r} fits none of the {len(sites)} weights: of {first.name!r} of "
            f"shape {tuple(first.weight.shape)}, for example, {left[first.name]}; use a fraction "
            "such as 0.5"
        )
    return Chosen([site for site in sites if site.name not in left], left)


def prune_by(
    sites: Sequence[Site], scores: Sequence[Tensor], sparsity: Sparsity, scope: str
) -> None:
    """Sets all weights but those of the highest scores to zero and stores what stays, in place.

    scores: of each site, of its weight's shape; what is zero already goes first
    scope: "layer" for the same share of each, "global" for one comparison of all; a pattern keeps
        as many of each in any case

    Raises OptionError, with nothing changed, for a layer that would lose all its weights.
    """
    goal = wanted(sparsity)
    known = [
        score.float().masked_fill(site.weight == 0, -torch.inf)
        for site, score in zip(sites, scores, strict=True)
    ]
    if isinstance(goal, Pattern):
        kept = [
            unrows(n_of_m(rows(score, site.axis), goal), tuple(score.shape), site.axis)
            for site, score in zip(sites, known, strict=True)
        ]
    elif scope == "global":
        sizes = [score.numel() for score in known]
        every = torch.cat([score.flatten() for score in known])
        flat = torch.split(largest(every, goal), sizes)
        kept = [keep.view(score.shape) for keep, score in zip(flat, known, strict=True)]
    else:
        kept = [largest(score.flatten(), goal).view(score.shape) for score in known]
    for site, keep in zip(sites, kept, strict=True):
        if not keep.any():
            raise emptied(site, sparsity, ' or scope="layer"' if scope == "global" else "")
    for site, keep in zip(sites, kept, strict=True):
        sparse_already = isinstance(goal, float) and sparse_form(site.form) is not None
        # What is as sparse already may say more of the places, as n of m.
        if sparse_already and not bool(((site.weight != 0) & ~keep).any()):
            continue
        site.hold(sparse(site.weight.masked_fill(~keep, 0), site.axis, goal))


def prune_layers(
    name: str,
    model: nn.Module,
    task: Task | None,
    choose: Choose,
    *,
    sparsity: Sparsity,
    samples: int,
    sites: tuple[Patterns, Patterns],
    shares: Shares | None = None,
    by_row: bool = False,
) -> Outcome:
    """Prunes layer after layer, each for what the pruned layers before it give, in place.

    name: of the method; sites: include, exclude
    choose: called for each group of a weight's outputs
    shares: what part of its weights each layer loses, by name; None for the same
    by_row: whether `choose` counts in each row, and not over all that it is given

    A weight with as many zeros as asked for keeps its values.
    """
    if task is None:
        raise TaskError(f"{name} needs inputs to run the network on; pass a task")
    found, goal = chosen(model, sparsity, *sites), wanted(sparsity)
    check_uncoded(found.sites)
    goals: dict[str, Wanted] = dict.fromkeys((site.name for site in found.sites), goal)
    if shares is not None and isinstance(goal, float):
        goals = {**shares(task, found.sites, goal)}
    for site in found.sites:
        most, size = goals[site.name], site.weight.numel()
        if isinstance(most, float) and round(most * size) == size:
            raise emptied(site, sparsity, "" if shares is None else ' or scope="layer"')

    def prune(layer: Layer) -> Form:
        weight, axis, goal = layer.site.weight, layer.site.axis, goals[layer.site.name]
        if not pruned(layer.matrix, goal):
            parts = problems(layer)
            own = [goal] * len(parts) if by_row else _shared_out(goal, parts)
            matrix = torch.cat(list(map(choose, parts, own)))
            if not matrix.any() and layer.matrix.any():
                raise emptied(layer.site, sparsity)
            weight = unrows(matrix.to(weight.dtype), tuple(weight.shape), axis)
        elif layer.sparse is not None and isinstance(goal, float):
            return layer.sparse
        return sparse(weight, axis, goal)

    layerwise(model, task, found.sites, prune, samples=samples)
    return found.outcome


def _shared_out(goal: Wanted, parts: Sequence[Problem]) -> list[Wanted]:
    """What each part is to lose, so that together they lose round(goal * n) of n weights."""
    if isinstance(goal, Pattern):
        return [goal] * len(parts)
    sizes = [part.target.numel() for part in parts]
    ends = [round(goal * end) for end in itertools.accumulate(sizes, initial=0)]
    return [(stop - start) / size for start, stop, size in zip(ends, ends[1:], sizes, strict=False)]


def pruned(matrix: Tensor, goal: Wanted) -> bool:
    """Whether a weight (outputs, inputs) has as many zeros as asked for."""
    zero = matrix == 0
    if isinstance(goal, Pattern):
        most = (~zero).view(len(matrix), -1, goal.m).sum(2).max()
        return int(most) <= goal.n
    return int(zero.sum()) >= round(goal * zero.numel())


def best_of_rows(scores: Tensor, goal: Wanted) -> Tensor:
    """True for what stays when every row (outputs, inputs) loses as much."""
    if isinstance(goal, Pattern):
        return n_of_m(scores, goal)
    return all_but(scores, round(goal * scores.shape[1]))


def n_of_m(scores: Tensor, pattern: Pattern) -> Tensor:
    """True for the n largest of every m neighbours in each row, (outputs, inputs)."""
    groups = scores.reshape(len(scores), -1, pattern.m)
    return all_but(groups, pattern.m - pattern.n).reshape(scores.shape)


def all_but(scores: Tensor, count: int) -> Tensor:
    """True along the last dimension for all but the `count` smallest; of equal ones the first go.

    scores: (..., n)
    """
    gone = scores.sort(dim=-1, stable=True).indices[..., :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, gone, False)


def largest(sizes: Tensor, sparsity: float) -> Tensor:
    """True for all but the round(sparsity * n) smallest of n sizes; of equal ones the first go.

    As `all_but`, without sorting the weights of a whole network.
    """
    count = round(sparsity * sizes.numel())
    keep = torch.ones_like(sizes, dtype=torch.bool)
    if count:
        threshold = sizes.kthvalue(count).values
        keep = sizes > threshold
        tied = (sizes == threshold).nonzero().flatten()
        keep[tied[count - int((sizes < threshold).sum()) :]] = True
    return keep


def sparse(weight: Tensor, axis: int, goal: Wanted | None) -> Bitmask | NofM:
    """The form of a pruned weight."""
    if isinstance(goal, Pattern):
        return NofM.encode(weight, n=goal.n, m=goal.m, axis=axis)
    return Bitmask.encode(weight)


def emptied(site: Site, sparsity: Sparsity, other: str = "") -> OptionError:
    """For a layer that would lose all its weights. other: way out"""
    return OptionError(
        f"sparsity={sparsity} would remove every weight of {site.name!r} of shape "
        f"{tuple(site.weight.shape)}; use a lower sparsity{other}, or leave it out with "
        f'exclude="{site.name}"'
    )
