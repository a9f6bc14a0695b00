"""Techniques that train, for loops that are not tersor's: what they put into a network, as regimes.

Each puts training forms into the network at once and returns a regime. A callback of
`tersor.train.callbacks` calls it from Lightning or from Hugging Face's `Trainer`. A loop of one's
own calls `begin`, then `penalty` and `gradients` behind each backward pass, `after` behind the
step, and `finish` at the end, which puts what is stored in place of what was trained.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from tersor.methods.masking import Masking, behind_mask, check_room, freeze
from tersor.methods.masks import Sparsity, chosen
from tersor.methods.quantize.rate import Spending, start
from tersor.methods.quantize.rate import freeze as frozen
from tersor.methods.sparse import check_uncoded
from tersor.surgery.hold import bake
from tersor.surgery.walk import Patterns, Site, vectors, walk
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
    for site in found.sites:
        for layer, attribute in site.uses:
            bake(layer, attribute)
        site.hold(behind_mask(site))
    return _Pruning(found.sites, sparsity, scope)


class _Pruning(Masking):
    def finish(self) -> None:
        freeze(self._sites, self._sparsity)


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
    regime = _Spending([start(site) for site in sites], bits)
    for site in others:
        start(site)
    regime.sites = [*sites, *others]
    return regime


class _Spending(Spending):
    sites: list[Site]

    def finish(self) -> None:
        frozen(self.sites)
