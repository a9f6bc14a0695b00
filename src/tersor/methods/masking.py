"""Masks that grow while a network trains, and weights that are held behind them meanwhile.

Source: Zhu and Gupta 2017, arXiv:1710.01878, eq. 1 and figure 1.
Differs from the paper: the sparsity grows until a set share of the training is over, at most a
hundred times; n:m patterns grow as well, by what they will remove.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms import SoftMask
from tersor.forms.form import Form, rows, unrows
from tersor.methods.learning import lessons_of
from tersor.methods.masks import Pattern, Sparsity, emptied, largest, n_of_m, pruned, sparse, wanted
from tersor.surgery.hold import bake, form_of, release
from tersor.surgery.walk import Site, walk
from tersor.task import Task
from tersor.train import Lessons, Regime, Training
from tersor.train.states import Snapshot

GROWTH = 0.6
"""Share of the steps in which masks grow; in the rest the weights settle."""
_TIMES = 100
"""Masks change at most so often, for choosing costs more than a step of a small network."""


def cubic(step: int, steps: int, start: float, goal: float) -> float:
    """The sparsity after `step` of `steps`: fast at first, while there is much to choose from."""
    return goal + (start - goal) * (1 - min(1.0, step / steps)) ** 3


class Masking(Regime):
    """Hides the smallest weights, more and more of them; what is hidden does not come back.

    sites: weights held as `SoftMask`
    scope: "layer" for the same share of each, "global" for one comparison of all
    """

    paced = chooses = True

    def __init__(self, sites: Sequence[Site], sparsity: Sparsity, scope: str) -> None:
        """The goal is that of `prune_by`; here it is reached in steps."""
        self._sites, self._sparsity, self._scope = sites, sparsity, scope
        self._goal = wanted(sparsity)
        self.forms = [soft(site) for site in sites]
        self.own = [form.scores for form in self.forms if form.scores is not None]
        self._alive = [form.mask.clone() for form in self.forms]
        self._masks = self._alive
        self._end, self._every, self._done = 1, 1, 0

    def scores(self, form: SoftMask) -> Tensor:
        """What is hidden first has the lowest."""
        return form.latent.detach().abs().masked_fill(~form.mask, -torch.inf)

    def begin(self, model: nn.Module, steps: int) -> None:
        """Sets the pace."""
        # Another loop may have moved the network after it was masked.
        self._alive = self._here(self._alive)
        self._masks = self._here(self._masks)
        self._end = max(1, round(GROWTH * steps))
        self._every = -(-self._end // _TIMES)

    def after(self, step: int) -> None:
        """Chooses anew if it is time. Raises OptionError for a layer that loses all its weights."""
        self._done = step + 1
        if self._done == self._end or (self._done < self._end and self._done % self._every == 0):
            self._choose()

    def enforce(self) -> None:
        """Puts the masks of now in force: a loop may have put back a state with older ones."""
        self._show()

    def _show(self) -> None:
        for form, mask in zip(self.forms, self._masks, strict=True):
            form.mask.copy_(mask)

    @property
    def settled(self) -> bool:
        """Whether masks are what they will be."""
        return self._done >= self._end

    def state(self) -> dict[str, Any]:
        """The masks, and how far they are."""
        return {"done": self._done, "masks": self._masks}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._done = state["done"]
        self._masks = self._here(state["masks"])
        self._show()

    def _here(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """On the devices of the weights."""
        return [mask.to(form.mask.device) for form, mask in zip(self.forms, masks, strict=True)]

    def _choose(self) -> None:
        kept = [
            keep.view(alive.shape) & alive
            for keep, alive in zip(self._kept(), self._alive, strict=True)
        ]
        for site, keep, alive in zip(self._sites, kept, self._alive, strict=True):
            if alive.any() and not keep.any():
                other = ' or scope="layer"' if self._scope == "global" else ""
                raise emptied(site, self._sparsity, other)
        self._masks = kept
        self._show()

    def _kept(self) -> list[Tensor]:
        """True for what is shown now, of each weight; what never was is among it at times."""
        known = [
            self.scores(form).float().masked_fill(~alive, -torch.inf)
            for form, alive in zip(self.forms, self._alive, strict=True)
        ]
        goal = self._goal
        if isinstance(goal, Pattern):
            known = [
                _spared(scores, site.axis, goal)
                for scores, site in zip(known, self._sites, strict=True)
            ]
        elif self._scope == "global":
            flat = self._few(_joined(known), _joined(self._alive))
            return list(torch.split(flat, [scores.numel() for scores in known]))
        return [
            self._few(scores.flatten(), alive)
            for scores, alive in zip(known, self._alive, strict=True)
        ]

    def _few(self, scores: Tensor, alive: Tensor) -> Tensor:
        """True for the highest scores (n,), as many as the schedule leaves now."""
        goal = self._goal
        end = 1 - goal.n / goal.m if isinstance(goal, Pattern) else goal
        start = 1 - float(alive.double().mean())
        return largest(scores, cubic(self._done, self._end, start, end))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _spared(scores: Tensor, axis: int, pattern: Pattern) -> Tensor:
    """Scores without end for the n largest of every m neighbours, which are never hidden."""
    kept = unrows(n_of_m(rows(scores, axis), pattern), tuple(scores.shape), axis)
    return scores.masked_fill(kept, torch.inf)


def soft(site: Site) -> SoftMask:
    """The form of a site inside `masked`."""
    form = site.form
    assert isinstance(form, SoftMask)
    return form


def behind_mask(site: Site) -> SoftMask:
    """What `masked` holds a weight by, where its size decides."""
    return SoftMask.encode(site.weight)


@contextmanager
def masked(model: nn.Module, sites: Sequence[Site], make: Callable[[Site], Form]) -> Iterator[None]:
    """Holds weights by training-only forms; after an error the whole network is as it was.

    make: the form of a site
    """
    before: list[Form | nn.Parameter] = []
    for site in sites:
        for layer, attribute in site.uses:
            bake(layer, attribute)
        before.append(site.form or getattr(*site.uses[0]))
    values = Snapshot([*model.parameters(), *model.buffers()])
    try:
        for site in sites:
            site.hold(make(site))
        yield
    except BaseException:
        for site, stored in zip(sites, before, strict=True):
            put_back(site, stored)
        values.restore()
        raise


def put_back(site: Site, stored: Form | nn.Parameter) -> None:
    """Stores a weight as it was before it was held by another form."""
    if isinstance(stored, Form):
        site.hold(stored)
        return
    for layer, attribute in site.uses:
        if form_of(layer, attribute) is not None:
            release(layer, attribute, stored)


def freeze(sites: Sequence[Site], sparsity: Sparsity) -> None:
    """The sparse forms in place of the masked ones; they give the same."""
    for site in sites:
        site.hold(sparse(site.weight, site.axis, wanted(sparsity)))


def check_room(sites: Sequence[Site], sparsity: Sparsity, scope: str = "layer") -> None:
    """Raises OptionError where nothing is left to prune, or a layer would lose all its weights."""
    goal = wanted(sparsity)
    if isinstance(goal, float) and scope == "global":
        zeros = sum(int((site.weight == 0).sum()) for site in sites)
        over = zeros >= round(goal * sum(site.weight.numel() for site in sites))
    else:
        over = all(pruned(rows(site.weight, site.axis), goal) for site in sites)
    if over:
        raise OptionError(
            f"sparsity={sparsity}: the {len(sites)} weights have as many zeros already; ask for "
            "more, or train on with distill.logits, which keeps zeros"
        )
    for site in sites:
        size = site.weight.numel()
        if isinstance(goal, float) and scope == "layer" and round(goal * size) == size:
            raise emptied(site, sparsity)


def schooling(
    name: str,
    model: nn.Module,
    task: Task | None,
    original: nn.Module | None,
    labels: float | None,
    temperature: float = 1.0,
) -> tuple[Lessons, nn.Module | None]:
    """What a network that is compressed learns from, and the teacher that judges it.

    original: by default the network as it is now
    labels: their share; with 1 there is no teacher, with None half where there are any
    """
    teacher = None if labels == 1 else original
    if teacher is None and labels != 1:
        # What an old weight norm computed cannot be copied.
        for site in walk(model):
            for layer, attribute in site.uses:
                bake(layer, attribute)
        teacher = copy.deepcopy(model)
    lessons = lessons_of(name, task, teacher, labels=labels, temperature=temperature)
    return lessons, teacher


def check_precision(name: str, training: Mapping[str, Any] | None) -> None:
    """Raises OptionError where gradients would come scaled to a regime that adds them up."""
    if Training.of(training).precision == "float16":
        raise OptionError(
            f"{name}: training={dict(training or {})!r}: in float16 the loss is scaled, and by "
            'another factor in each step; use "bfloat16" or "float32"'
        )
