"""Gates that are learned along with the weights, and steered to an asked sparsity.

Source: Louizos, Welling, Kingma 2018, arXiv:1712.01312, eqs. 9 and 12, for the expected number of
open gates; Xia, Zhong, Chen 2022 (CoFi), arXiv:2204.00408, section 3.1 and eq. 5, for a penalty
whose multipliers rise until the sparsity is reached.
Differs from the papers: rates of gates and multipliers follow from the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.forms import HardConcrete, SoftMask
from tersor.methods.masking import GROWTH
from tersor.methods.masks import emptied
from tersor.surgery.walk import Site
from tersor.train import Regime

START = 2.2
"""Of gates: 98 % open without noise."""
_RAMP = 0.5
"""Share of the steps with gates in which the goal is raised."""
_TRAVEL = 30.0
"""How far a gate could move in all these steps; from open to closed it is 5."""
_PRESSURE = 600.0
"""How far a multiplier would rise in all these steps if the goal stayed 1 away."""


class Gating(Regime):
    """Closes gates until a share of the weights is gone; then it cuts exactly and lets them settle.

    sites: weights held as `HardConcrete`; as `SoftMask` from then on, with the same latents
    sparsity: share of all their weights
    generator: draws the noise
    reached: the share of weights whose gates had closed by themselves when they were cut
    """

    paced = chooses = True

    def __init__(self, sites: Sequence[Site], sparsity: float, generator: torch.Generator) -> None:
        """Gates are trained here, weights by whoever trains the network."""
        self._sites, self._sparsity, self._generator = sites, sparsity, generator
        self._forms = [gated(site) for site in sites]
        self.own = [form.openness for form in self._forms]
        self._size = sum(form.latent.numel() for form in self._forms)
        self._multipliers = [0.0, 0.0]
        self._end, self._done, self.reached = 1, 0, 0.0

    def begin(self, model: nn.Module, steps: int) -> None:
        """Sets the pace."""
        self._end = max(1, round(GROWTH * steps))
        rate = min(0.5, _TRAVEL / self._end)
        self._optimizer = torch.optim.Adam(self.own, lr=rate)
        self._draw()

    def penalty(self, step: int) -> Tensor | None:
        """CoFi's: the gap to the goal of this step and its square, each with its multiplier."""
        if self.settled:
            return None
        gap = self._gap(step)
        return self._multipliers[0] * gap + self._multipliers[1] * gap.square()

    def gradients(self, step: int) -> None:
        """Moves the gates down their gradients, and the multipliers up theirs."""
        if self.settled:
            return
        gap = float(self._gap(step).detach())
        self._optimizer.step()
        self._optimizer.zero_grad()
        pressure = _PRESSURE / self._end
        self._multipliers[0] += pressure * gap
        self._multipliers[1] += pressure * gap * gap

    def after(self, step: int) -> None:
        """Draws the noise of the next step, or cuts. Raises OptionError for a layer without any."""
        self._done = step + 1
        if self._done < self._end:
            self._draw()
        elif self._done == self._end:
            self._cut()

    @property
    def settled(self) -> bool:
        """Whether gates are what they will be."""
        return self._done >= self._end

    @property
    def leapt(self) -> bool:
        """Whether gates have just become factors of the weights."""
        return self._done == self._end

    def state(self) -> dict[str, Any]:
        """Gates, masks behind them, and all that moves them."""
        return {
            "done": self._done,
            "reached": self.reached,
            "multipliers": self._multipliers,
            "openness": [form.openness for form in self._forms],
            "noise": [form.noise for form in self._forms],
            "masks": [s.form.mask for s in self._sites if isinstance(s.form, SoftMask)],
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._done, self.reached = state["done"], state["reached"]
        self._multipliers = list(state["multipliers"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        for form, openness, noise in zip(
            self._forms, state["openness"], state["noise"], strict=True
        ):
            form.openness.detach().copy_(openness)
            form.noise = None if noise is None else noise.to(form.openness.device)
        if self.settled:
            self._hold(state["masks"])

    def _gap(self, step: int) -> Tensor:
        """What the expected share of closed gates lacks to the goal of this step."""
        with torch.enable_grad():
            open_ones = torch.stack(
                [form.chance().expand_as(form.latent).sum() for form in self._forms]
            ).sum()
        goal = self._sparsity * min(1.0, (step + 1) / (_RAMP * self._end))
        return goal - (1 - open_ones / self._size)

    def _draw(self) -> None:
        for form in self._forms:
            noise = torch.rand(form.openness.shape, generator=self._generator)
            # Neither 0 nor 1, whose logarithms are endless.
            form.noise = noise.clamp(1e-6, 1 - 1e-6).to(form.openness.device)

    @torch.no_grad()
    def _cut(self) -> None:
        """Makes the most closed gates masks, as many as were asked for, and the others factors."""
        closed = sum(int((form.gates() == 0).expand_as(form.latent).sum()) for form in self._forms)
        self.reached = closed / self._size
        masks = self._masks()
        for site, form, mask in zip(self._sites, self._forms, masks, strict=True):
            if form.latent.any() and not (form.latent * mask).any():
                raise emptied(site, self._sparsity)
        for form in self._forms:
            gates = form.gates()
            # One that closed too early and is opened again has to let something through.
            form.latent.mul_(torch.where(gates > 0, gates, torch.sigmoid(form.openness)))
        self._hold(masks)

    def _masks(self) -> list[Tensor]:
        """False for gates that go: the most closed, while what goes with them is not too much."""
        openness, sizes = [], []
        for form in self._forms:
            openness.append(form.openness.masked_fill(_dead(form), -torch.inf).flatten())
            row = form.latent.numel() // form.openness.numel()
            sizes.append(torch.full_like(openness[-1], row, dtype=torch.long))
        order = torch.cat(openness).argsort(stable=True)
        gone = torch.cat(sizes)[order].cumsum(0) <= round(self._sparsity * self._size)
        shown = torch.ones_like(gone).scatter_(0, order, ~gone)
        parts = torch.split(shown, [len(part) for part in openness])
        return [
            part.view(form.openness.shape).expand_as(form.latent) & (form.latent != 0)
            for part, form in zip(parts, self._forms, strict=True)
        ]

    def _hold(self, masks: Sequence[Tensor]) -> None:
        for site, form, mask in zip(self._sites, self._forms, masks, strict=True):
            soft = SoftMask(form.latent.detach(), mask.clone().to(form.latent.device))
            # The very tensor that the optimizer trains.
            soft.latent = form.latent
            site.hold(soft)


def gated(site: Site) -> HardConcrete:
    """The form of a site whose gates are learned."""
    form = site.form
    assert isinstance(form, HardConcrete)
    return form


def _dead(form: HardConcrete) -> Tensor:
    """Which gates have nothing but zeros to let through; of the shape of `openness`."""
    sizes = form.latent.detach().abs()
    for at, n in enumerate(form.openness.shape):
        sizes = sizes.amax(at, keepdim=True) if n == 1 else sizes
    return sizes == 0
