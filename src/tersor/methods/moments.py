"""Second moments of what a weight is multiplied with: summing them up, and what errors then cost.

Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, section 3.3, for the damping; Chee et al. 2023
(QuIP), arXiv:2307.13304, theorem 1, for feeding errors forward by the factors of the moments
themselves, where GPTQ takes those of their inverse. Both give the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.surgery.walk import Site

DAMPING = 0.01
"""Share of the mean energy that is added to that of each input."""


@dataclass(frozen=True)
class Moments:
    """Means over everything that met a weight; x is what the quantized network brings.

    own: (groups, inputs, inputs) float32, of x x^T
    cross: (groups, inputs, inputs) float32, of y x^T, where y is what the original brings; None
        where it was not asked for or not seen
    """

    own: Tensor
    cross: Tensor | None


class Sums:
    """Moments of one weight, being added up."""

    def __init__(self) -> None:
        self._own: Tensor | None = None
        self._cross: Tensor | None = None
        self._count = 0
        self._pairs = 0

    def add(self, site: Site, values: Tensor, others: Tensor | None = None) -> None:
        """values, others: (groups, rows, inputs). Raises ModelError for what is not finite."""
        wide = values.float()
        self._own = _added(self._own, wide, wide)
        self._count += wide.shape[1]
        # No product of two inputs is beyond both of their squares.
        if not bool(torch.isfinite(self._own.diagonal(dim1=1, dim2=2)).all()):
            raise ModelError(
                f'what "{site.name}" of shape {tuple(site.weight.shape)} is given on calibration '
                "inputs is not finite; check the inputs, or exclude the layers before it"
            )
        if others is not None and others.shape == values.shape:
            self._cross = _added(self._cross, others.float(), wide)
            self._pairs += wide.shape[1]

    def moments(self) -> Moments | None:
        """Of everything so far, which ends the adding; None if there was nothing."""
        if self._own is None or self._count == 0:
            return None
        # Routed elsewhere in one of the networks, a row has no partner.
        whole = self._cross is not None and self._pairs == self._count
        cross = self._cross.div_(self._count) if self._cross is not None and whole else None
        own, self._own, self._cross = self._own.div_(self._count), None, None
        return Moments(own, cross)


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    if total is None:
        return left.transpose(1, 2) @ right
    return total.baddbmm_(left.transpose(1, 2), right)


@dataclass(frozen=True)
class Metric:
    """What errors E (outputs, inputs) of a weight cost: tr(E M E^T), M = own + extra I.

    Rows of a weight share one, and with it the factors that are computed only once.

    own: (inputs, inputs), positive semidefinite
    """

    own: Tensor
    extra: float = 0.0

    @classmethod
    def damped(cls, own: Tensor) -> Metric:
        """The damping stands for inputs that nobody saw. Without any, all inputs are alike."""
        energy = float(own.diagonal().mean())
        if not energy > 0:
            return cls(torch.eye(len(own), dtype=own.dtype, device=own.device))
        return cls(own, DAMPING * energy)

    @cached_property
    def energies(self) -> Tensor:
        """The diagonal of M, (inputs,)."""
        return self.own.diagonal() + self.extra

    @cached_property
    def order(self) -> Tensor:
        """(inputs,), by rising energy."""
        return self.own.diagonal().argsort(stable=True)

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Those of M with its inputs in that order, see `unit_lower`."""
        found = self.own[self.order[:, None], self.order]
        found.diagonal().add_(self.extra)
        return unit_lower(found)

    def of(self, errors: Tensor) -> Tensor:
        """What each row of errors costs, (outputs,)."""
        return ((errors @ self.own) * errors).sum(1) + self.extra * errors.square().sum(1)

    def times(self, values: Tensor) -> Tensor:
        """M values, for (inputs, ...)."""
        return (self.own @ values).add_(values, alpha=self.extra)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows and columns start to stop of M."""
        found = self.own[start:stop, start:stop].clone()
        found.diagonal().add_(self.extra)
        return found

    def solve(self, pulls: Tensor) -> Tensor:
        """X (outputs, inputs) of X M = pulls."""
        lower, pivots = self.factors
        solve = partial(torch.linalg.solve_triangular, left=False, unitriangular=True)
        half = solve(lower.T, pulls[:, self.order], upper=True)
        found: Tensor = solve(lower, half / pivots, upper=False)
        return found[:, self.order.argsort()]


def unit_lower(moments: Tensor) -> tuple[Tensor, Tensor]:
    """L and d of moments = L diag(d) L^T, L unit lower triangular, (n, n) and (n,).

    An error in row n - 1 of a vector is best made up for by moving each row k before it by
    -error * L[n - 1, k]; what is left then costs d[n - 1] * error^2; and so on upwards. L takes the
    place of the moments. Raises ModelError for those not positive definite in their precision.
    """
    mean = float(moments.diagonal().mean())
    # Symmetric, and so stored as the library wants it, which otherwise makes a copy.
    lower = moments.T
    try:
        torch.linalg.cholesky(lower, out=lower)
    except RuntimeError as error:
        raise ModelError(
            "what layers are given on calibration inputs is too large to work with: a mean square "
            f"of {mean:.3g}; check the inputs"
        ) from error
    roots = lower.diagonal().clone()
    return lower.div_(roots), roots.square()
