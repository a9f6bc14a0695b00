"""Trellis codes of a weight, a strip of columns at a time, each making up for the ones before it.

Source: Chee et al. 2023 (QuIP), arXiv:2307.13304, eq. 3 and theorem 1 (LDLQ, the same as GPTQ), and
Tseng et al. 2024 (QTIP), arXiv:2406.11235, section 4.1, for strips of columns.
Differs: strips are as narrow as a ring allows, one column where the weight has 128 rows or more, so
that every error is fed forward at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.forms import Bitshift
from tersor.forms.bitshift import from_tiles, pack, states, to_tiles, values
from tersor.methods.moments import unit_lower
from tersor.methods.viterbi import nearest_rings

_RING = 256
SPREAD = {1: 1.0, 2: 1.0, 3: 0.95, 4: 0.9}
"""Root mean square of the numbers to be coded, in units of the scale, with the least error."""


@dataclass(frozen=True)
class Code:
    """A bit-shift trellis: see `Bitshift`."""

    bits: int
    state_bits: int

    def nearest(self, matrix: Tensor, weights: Tensor, tile: tuple[int, int]) -> Tensor:
        """(tiles, length) codes for a matrix in units of its scale, weights of its shape."""
        return nearest_rings(
            to_tiles(matrix, tile),
            to_tiles(weights, tile),
            bits=self.bits,
            state_bits=self.state_bits,
        )

    def levels(self, codes: Tensor, like: Tensor, tile: tuple[int, int]) -> Tensor:
        """What codes stand for, in the shape of `like`."""
        found = values(states(codes, self.bits, self.state_bits))
        outputs, inputs = like.shape
        return from_tiles(found, outputs, inputs, tile)

    def tile(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Rows of about 256, or all there are and as many columns as make a ring of 128."""
        rows = -(-outputs // max(1, round(outputs / _RING)))
        columns = min(inputs, -(-_RING // (2 * rows)))
        return max(rows, -(-self.state_bits // (self.bits * columns))), columns


def encode(matrix: Tensor, moments: Tensor | None, code: Code) -> Bitshift:
    """The codes of a weight that change its outputs least.

    matrix: (outputs, inputs) float32, best rotated
    moments: (inputs, inputs), of what it is multiplied with, invertible; None where all inputs are
        alike, and the weight itself is to change least
    """
    tile = code.tile(*matrix.shape)
    scale = (matrix.square().mean().sqrt() / SPREAD[code.bits]).clamp(min=1e-30)
    scale = scale.to(torch.bfloat16).float()
    if moments is None:
        codes = code.nearest(matrix / scale, torch.ones_like(matrix), tile)
    else:
        codes = _fed_forward(matrix / scale, moments, code, tile)
    levels = code.levels(codes, matrix, tile)
    return Bitshift(
        pack(codes, code.bits),
        best_scale(matrix, levels, moments).to(torch.bfloat16),
        bits=code.bits,
        state_bits=code.state_bits,
        tile=tile,
        axis=0,
        shape=tuple(matrix.shape),
        dtype=torch.float32,
    )


def _fed_forward(matrix: Tensor, moments: Tensor, code: Code, tile: tuple[int, int]) -> Tensor:
    # Errors (E U)_k of moments = U U^T, U upper triangular, are each made as small as can be.
    lower, pivots = unit_lower(moments.flip(0, 1))
    upper = (lower.mul_(pivots.sqrt())).flip(0, 1)
    carried, found = torch.zeros_like(matrix), []
    for start in range(0, matrix.shape[1], tile[1]):
        own, later = slice(start, start + tile[1]), slice(start + tile[1], None)
        within = upper[own, own]
        moved = torch.linalg.solve_triangular(within, carried[:, own], upper=True, left=False)
        block = matrix[:, own] + moved
        # What an error costs after the best answer of the columns after it.
        weights = (within @ within.T).diagonal()
        found.append(code.nearest(block, (weights / weights.mean()).expand_as(block), tile))
        error = matrix[:, own] - code.levels(found[-1], block, tile)
        carried[:, later] += error @ upper[own, later]
    return torch.cat(found)


def best_scale(matrix: Tensor, levels: Tensor, moments: Tensor | None) -> Tensor:
    """(outputs, 1), what to multiply each row of levels with for the least error of its output."""
    seen = levels if moments is None else levels @ moments
    energy = (seen * levels).sum(1, keepdim=True)
    return (seen * matrix).sum(1, keepdim=True) / energy.clamp(min=1e-30)
