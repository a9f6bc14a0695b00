"""The codes of a bit-shift trellis that are nearest to sequences of numbers.

Source: Tseng et al. 2024 (QTIP), arXiv:2406.11235, section 3.2 and algorithm 4, for closing a path
to a ring: where it closes is decided by the best path through the numbers around that place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.codec.coders.native import native
from tersor.forms.bitshift import values

Floats = np.ndarray[Any, np.dtype[np.float32]]

_REACH = 128
"""Numbers on each side of the place where a ring closes that decide how."""


def nearest_rings(numbers: Tensor, weights: Tensor, *, bits: int, state_bits: int) -> Tensor:
    """(rings, length) uint8, codes of `bits` bits whose values are near to `numbers`.

    numbers: (rings, length) float32, in units of the scale
    weights: (rings, length) float32, of a squared error

    The sum of weighted squared errors is the least among the rings that close as the best open
    path does. Takes 2**state_bits operations for each number, twice.
    """
    table = values(torch.arange(2**state_bits)).numpy()
    x, w = (
        np.ascontiguousarray(t.cpu().numpy(), np.float32)
        for t in (numbers, weights.expand_as(numbers))
    )
    length = x.shape[1]
    reach = min(_REACH, length // 2)
    codes = np.empty(x.shape, np.uint8)
    compiled = native()
    if compiled is not None:
        compiled.bitshift_search(
            x, w, table, bits, state_bits, reach, codes.reshape(-1), torch.get_num_threads()
        )
        return torch.from_numpy(codes).to(numbers.device)
    for i in range(len(x)):
        codes[i] = _nearest_ring(x[i], w[i], table, bits, reach)
    return torch.from_numpy(codes).to(numbers.device)


def _nearest_ring(x: Floats, w: Floats, table: Floats, bits: int, reach: int) -> Any:
    groups = len(table) >> bits
    around = np.arange(-reach, reach) % len(x)
    open_path = _path(x[around], w[around], table, bits, np.zeros(len(table), np.float32), None)
    # What the last number's state shares with that of the first.
    seam = open_path[reach - 1] % groups
    start = np.full(len(table), np.inf, np.float32)
    start[seam::groups] = 0
    return _path(x, w, table, bits, start, seam) % 2**bits


def _path(
    x: Floats, w: Floats, table: Floats, bits: int, cost: Floats, seam: int | None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The states of the best path. seam: the lower bits of the last one, None for any"""
    groups = len(table) >> bits
    came = []
    for number, weight in zip(x, w, strict=True):
        # A state's upper bits say from which group it comes, all but its lowest bits.
        choices = cost.reshape(-1, groups)
        came.append(choices.argmin(0))
        error = number - table
        cost = choices.min(0).repeat(2**bits) + weight * (error * error)
    ends = np.arange(len(table)) if seam is None else np.arange(seam, len(table), groups)
    state = int(ends[cost[ends].argmin()])
    found = np.empty(len(x), np.int64)
    for i in reversed(range(len(x))):
        found[i] = state
        group = state >> bits
        state = int(came[i][group]) * groups + group
    return found
