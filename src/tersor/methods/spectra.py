"""Spectra: what a weight loses with each rank, in the outputs that its layer gives.

With the second moments H = L L^T of the inputs, the singular values of W L are those of the
layer's outputs: cutting them off behind a rank costs exactly the sum of the squares that are cut
off, and no other factors of that rank cost less.

Source: Wang et al. 2025 (SVD-LLM V2), arXiv:2503.12340, section 3.2, which takes the root of H by
its eigenvectors; Izenman 1975, "Reduced-rank regression for the multivariate linear model", eq.
1.8, for the factors as a projection of the outputs, which needs no inverse of L.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-4
"""Share of the mean energy that is added to that of each direction, for those nobody saw."""


@dataclass(frozen=True)
class Spectrum:
    """A weight in its best basis of outputs.

    W = left @ right, and the first r columns and rows are the best factors of rank r.

    left: (outputs, k) float64; right: (k, inputs) float64
    energies: (k,) float64, falling: what of tr(W H W^T) each rank stands for
    """

    left: Tensor
    right: Tensor
    energies: Tensor

    @property
    def lost(self) -> Tensor:
        """(k + 1,): what is lost with 0 to k ranks, in the units of the energies."""
        tails = self.energies.flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(outputs, rank) and (rank, inputs), each pair of vectors of one length."""
        left, right = self.left[:, :rank], self.right[:rank]
        sizes = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-300)).sqrt()
        sizes = torch.where(sizes > 0, sizes, 1.0)
        return left * sizes, right / sizes[:, None]


def spectrum(matrix: Tensor, inputs: Tensor | None, answers: Tensor | None = None) -> Spectrum:
    """The spectrum of a weight (outputs, inputs).

    inputs: (inputs, inputs), second moments of what it is multiplied with; None for all directions
        alike
    answers: (outputs, outputs), how the loss curves in what it gives; None for all alike. Then
        tr(A W H W^T) is what the energies add up to
    """
    wide = matrix.double().cpu()
    seen = wide if inputs is None else wide @ root(inputs)
    if answers is None:
        u, s, _ = torch.linalg.svd(seen, full_matrices=False)
        return Spectrum(u, u.T @ wide, s.square())
    back = root(answers)
    u, s, _ = torch.linalg.svd(back @ seen, full_matrices=False)
    return Spectrum(torch.linalg.solve(back, u), u.T @ back @ wide, s.square())


def root(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """The symmetric root R of moments with their damping, R R = H + damping * mean energy * I."""
    wide = moments.double().cpu()
    level = float(wide.diagonal().mean()) or 1.0
    values, vectors = torch.linalg.eigh(wide)
    # Sums of float32 leave values a little below zero.
    sizes = (values.clamp(min=0) + damping * level).sqrt()
    found: Tensor = (vectors * sizes) @ vectors.T
    return found


def energy_of(matrix: Tensor, inputs: Tensor | None, answers: Tensor | None = None) -> float:
    """tr(A W H W^T) of a weight or an error, with the damping that `root` adds."""
    seen = matrix if inputs is None else matrix @ root(inputs)
    return float((seen if answers is None else root(answers) @ seen).square().sum())


def share(lost: float, energy: float) -> float:
    """Of the energy; nothing of nothing."""
    return max(lost, 0.0) / energy if energy > 0 else 0.0


def low_rank(matrix: Tensor, moments: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """(outputs, rank) and (rank, inputs) whose product is nearest to `matrix`, as inputs see it.

    moments: (inputs, inputs), None for all directions alike
    """
    left, right = spectrum(matrix, moments).factors(rank)
    return left.to(matrix), right.to(matrix)
