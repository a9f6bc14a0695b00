"""Places of values in as few whole bytes as hold them."""

from __future__ import annotations

import torch
from torch import Tensor


def width_of(size: int) -> int:
    """Bytes that a place in a tensor of `size` values needs, 1 to 8."""
    return max(1, -(-(size - 1).bit_length() // 8))


def pack_places(places: Tensor, size: int) -> Tensor:
    """(n,) int64 places from 0 to size - 1 -> (n, width) uint8, the lowest byte first."""
    shifts = torch.arange(0, 8 * width_of(size), 8, device=places.device)
    return ((places[:, None] >> shifts) & 255).to(torch.uint8)


def unpack_places(packed: Tensor) -> Tensor:
    """The inverse of `pack_places`."""
    shifts = torch.arange(0, 8 * packed.shape[1], 8, device=packed.device)
    return (packed.long() << shifts).sum(1)
