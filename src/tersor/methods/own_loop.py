"""Techniques that train, for loops that are not tersor's: what they put into a network, as regimes.

Each puts training forms into the network at once and returns a regime. A callback of
`tersor.train.callbacks` calls it from Lightning or from Hugging Face's `Trainer`. A loop of one's
own calls `begin`, then `penalty` and `gradients` behind each backward pass, `after` behind the
step, and `finish` at the end, which puts what is stored in place of what was trained. `finish`
always leaves a network that can be used and saved, and warns where it is not what was asked for;
behind a loop that an error stopped it may be called by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from tersor.forms import Bitmask, NofM
from tersor.methods.masking import Masking, behind_mask, check_room, freeze, masked, soft
from tersor.methods.masks import Sparsity, chosen
from tersor.methods.prune.movement import Moving, scored
from tersor.methods.quantize import lsq, rate
from tersor.methods.sparse import check_uncoded, sparse_form
from tersor.surgery.walk import Patterns, Site, vectors, walk
from tersor.task import Task
from tersor.train import Regime


def gradual_pruning(
    model: nn.Module,
    *,
    sparsity: Sparsity = 0.8,
    scope: Literal["layer", "global"] = "layer",
    include: Patterns = None,
    exclude: Patterns = None,
) -> Regime:
    """Weights become zero while the network trains, as `prune.gradual` does it.

    Options and errors as there.
    """
    found = chosen(model, sparsity, include, exclude)
    check_room(found.sites, sparsity, scope)
    with masked(model, found.sites, behind_mask):
        regime = _Pruning(found.sites, sparsity, scope)
    return regime


def movement_pruning(
    model: nn.Module,
    *,
    sparsity: Sparsity = 0.8,
    scope: Literal["layer", "global"] = "layer",
    include: Patterns = None,
    exclude: Patterns = None,
) -> Regime:
    """Weights that training moves towards zero become zero, as `prune.movement` does it.

    Options and errors as there. Gradients are to have one scale in all steps: that of a loss in
    float16 is to be taken out before `gradients`, as Lightning does. The `Trainer` of transformers
    clips before, and the gradients of the scores with the others.
    """
    found = chosen(model, sparsity, include, exclude)
    check_room(found.sites, sparsity, scope)
    with masked(model, found.sites, scored):
        regime = _Moving(found.sites, sparsity, scope)
    return regime


class _Pruning(Masking):
    def enforce(self) -> None:
        back = sum(
            int((form.mask & ~mask).sum())
            for form, mask in zip(self.forms, self._masks, strict=True)
        )
        if back:
            warnings.warn(
                f"the loop put an earlier state back, in which {back} weights were in use that "
                "are to be zero; they are zero now, and no step has made up for it: compare with "
                "the last state, as without load_best_model_at_end",
                stacklevel=2,
            )
        super().enforce()

    def finish(self) -> None:
        self.enforce()
        if self.settled:
            freeze(self._sites, self._sparsity)
            return
        zeros = sum(int((~form.mask).sum()) for form in self.forms)
        share = zeros / sum(form.mask.numel() for form in self.forms)
        warnings.warn(
            f"sparsity={self._sparsity!r} was asked for, and {share:.3f} of the weights are zero",
            stacklevel=2,
        )
        for site in self._sites:
            site.hold(soft(site).freeze())


class _Moving(Moving, _Pruning):
    pass


def rate_penalty(
    model: nn.Module,
    *,
    bits: float = 1.0,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Regime:
    """The loss gets a price for the bits of codes, as in `quantize.rate`.

    Options and errors as there; batch norms are to stand in evaluation mode, or to be folded.
    """
    sites, others = walk(model, include, exclude), vectors(model, include, exclude)
    check_uncoded(sites)
    with masked(model, [*sites, *others], rate.start):
        regime = _Spending([rate.rounded(site) for site in sites], bits)
    regime.sites = [*sites, *others]
    return regime


class _Spending(rate.Spending):
    sites: list[Site]

    def finish(self) -> None:
        self.enforce()
        if not self.settled:
            warnings.warn(
                f"bits={self._bits} was asked for, and a weight takes {self._shown:.3g} bits",
                stacklevel=2,
            )
        rate.freeze(self.sites)


def lsq_training(
    model: nn.Module,
    task: Task,
    *,
    bits: int = 2,
    activation_bits: int | None = 2,
    ends: int = 8,
    noise: float = 1.0,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Regime:
    """Weights and activations are rounded while the network trains, as `quantize.lsq` does it.

    task: whose calibration inputs tell how large activations are at the start
    generator: draws which weights are rounded, where noise is below 1

    Other options and errors as there. Take Adam: the gradients of scales are of another size than
    those of weights.
    """
    sites = walk(model, include, exclude)
    check_uncoded(sites)
    lsq.check_wide(sites)
    pruned = {site.name: sparse_form(site.form) for site in sites}
    with (
        lsq.gridded(model, task, sites, activation_bits, ends) as widths,
        masked(model, sites, lambda site: lsq.start(site, widths.get(site.name, bits))),
    ):
        forms = [lsq.trained(site) for site in sites]
    order = generator or torch.Generator().manual_seed(0)
    regime = _Noise(forms, noise, order) if noise < 1 else _Rounding()
    regime.model, regime.sites, regime.pruned = model, sites, pruned
    return regime


class _Rounding(Regime):
    model: nn.Module
    sites: list[Site]
    pruned: Mapping[str, Bitmask | NofM | None]

    def finish(self) -> None:
        lsq.freeze(self.model, self.sites, self.pruned)


class _Noise(_Rounding, lsq.Noise):
    pass
