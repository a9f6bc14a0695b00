"""Soft-mask form: a float weight of which a mask shows a part, for training that prunes.

Source: Zhu and Gupta 2017, arXiv:1710.01878, section 3, for weights that stay behind their mask;
Sanh, Wolf, Rush 2020, arXiv:2005.07683, section 4, for scores learned straight through it.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.forms.bitmask import Bitmask
from tersor.forms.form import Form, Part


class SoftMask(Form):
    """weight = latent * mask

    latent: float, of the weight's shape, trained; what the mask hides gets no gradient
    mask: bool, of the weight's shape, set from outside while training goes on
    scores: float, of the weight's shape, or None. What the mask is chosen by; its gradient is as if
        it were the mask, dL/dweight * latent, in hidden places too
    """

    kind = "soft_mask"
    training_only = True

    def __init__(self, latent: Tensor, mask: Tensor, scores: Tensor | None = None) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(tuple(latent.shape), latent.dtype)
        self.latent = nn.Parameter(latent.contiguous())
        self.register_buffer("mask", mask.contiguous())
        self.mask: Tensor
        self.scores = None if scores is None else nn.Parameter(scores.contiguous())

    @classmethod
    def encode(cls, weight: Tensor, *, scored: bool = False) -> Self:
        """Starts with the weight; what is zero is hidden. scored: whether there are scores, of 0"""
        latent = weight.detach().clone()
        return cls(latent, latent != 0, torch.zeros_like(latent) if scored else None)

    def dense(self) -> Tensor:
        """The weight with zeros where the mask hides it."""
        mask = self.mask.to(self.latent.dtype)
        if self.scores is not None:
            # Worth exactly 0, so that the mask's gradient goes to the scores.
            mask = mask + (self.scores - self.scores.detach())
        return (self.latent * mask).to(self.dtype)

    def freeze(self) -> Bitmask:
        """The deployed form; its weight equals `dense()` exactly."""
        return Bitmask.encode(self.dense())

    def parts(self) -> tuple[Part, ...]:
        """What is trained; frozen it is less."""
        return (("latent", self.latent.element_size() * 8), ("mask", 1))

    def config(self) -> dict[str, Any]:
        """Nothing: the tensors say it all."""
        return {}
