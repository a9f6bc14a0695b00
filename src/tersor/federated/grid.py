"""Updates as whole numbers that can be summed under masks, and the messages that carry them.

A vector's message: "tfm1", the round (4 bytes, little-endian), its numbers, each in as many bytes
as the modulus has, and a CRC-32. A table, of what concerns several clients: for each a number (4
bytes) and its content as a part.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tersor.codec.coders.static import part, parted
from tersor.errors import FileError, OptionError
from tersor.federated.layout import Layout
from tersor.federated.messages import opened, sealed
from tersor.federated.options import check_count, check_number
from tersor.federated.secure import Vector, least_threshold

_HEAD = struct.Struct("<4sI")
_MAGIC = b"tfm1"
_CLIENTS, _CELL = 2**16, 1024
"""In a table at most, and bytes of each."""


@dataclass(frozen=True)
class Secure:
    """How updates are hidden. Clients and server must be given the same.

    largest: numbers of a weighted change beyond this are cut to it, and what is cut is lost
    bits: of each number, 2 to 24: codes from -(2**(bits - 1) - 1) to 2**(bits - 1) - 1
    modulus_bits: 8, 16, 24 or 32: of the sum, and of each number sent; must hold the sum of all
    threshold: clients that must remain to open a sum, None for two thirds of those of a round
    """

    largest: float
    bits: int = 16
    modulus_bits: Literal[8, 16, 24, 32] = 32
    threshold: int | None = None

    def __post_init__(self) -> None:
        check_number("largest", self.largest)
        check_count("bits", self.bits, least=2, most=24)
        if self.modulus_bits not in (8, 16, 24, 32):
            raise OptionError(f"modulus_bits={self.modulus_bits!r} must be 8, 16, 24 or 32; try 32")
        if self.threshold is not None:
            check_count("threshold", self.threshold, least=2)

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1)) - 1

    def needed(self, clients: int) -> int:
        """The threshold among so many. Raises OptionError where no sum could be opened."""
        found = least_threshold(clients) if self.threshold is None else self.threshold
        if clients < found:
            raise OptionError(
                f"threshold={found} cannot be met by the {clients} clients of a round; lower it, "
                "or ask more clients"
            )
        if 2 * found <= clients:
            raise OptionError(
                f"threshold={found} is no majority of the {clients} clients of a round, so that a "
                "server could ask two halves for different secrets; raise it"
            )
        if clients * self.top >= 2 ** (self.modulus_bits - 1):
            raise OptionError(
                f"modulus_bits={self.modulus_bits} does not hold the sum of {clients} clients with "
                f"bits={self.bits}; use fewer bits, or more for the modulus"
            )
        return found


def on_grid(change: Sequence[Tensor], secure: Secure, generator: torch.Generator) -> Vector:
    """All numbers as codes modulo 2**32, rounded up or down by chance and right on average."""
    flat = torch.cat([tensor.reshape(-1) for tensor in change]).double()
    scaled = flat.clamp(-secure.largest, secure.largest) * (secure.top / secure.largest)
    drawn = torch.rand(flat.shape, generator=generator, dtype=torch.float64)
    codes = (scaled + drawn).floor().clamp(-secure.top, secure.top)
    return codes.to(torch.int32).numpy().view(np.uint32)


def off_grid(total: Vector, secure: Secure, layout: Layout) -> list[Tensor]:
    """A sum of codes, which is taken for the one nearest to zero, as float32 numbers."""
    spare = np.int32(32 - secure.modulus_bits)
    codes = (total.view(np.int32) << spare) >> spare
    flat = torch.from_numpy(codes.astype(np.float64) * (secure.largest / secure.top)).float()
    parts = torch.split(flat, [math.prod(shape) for shape in layout.shapes])
    return [tensor.reshape(shape) for tensor, shape in zip(parts, layout.shapes, strict=True)]


def write_vector(vector: Vector, round_: int, modulus_bits: int) -> bytes:
    """See the module. What the modulus does not have is left out: sums do not depend on it."""
    planes = vector.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : modulus_bits // 8]
    return sealed(_HEAD.pack(_MAGIC, round_) + planes.tobytes())


def read_vector(message: bytes, count: int, round_: int, modulus_bits: int) -> Vector:
    """Raises FileError for bytes that are no vector of this round."""
    width = modulus_bits // 8
    size = _HEAD.size + width * count
    content = opened(message, size, "masked update")
    if len(content) != size or bytes(content[:4]) != _MAGIC:
        raise FileError("the message is no masked update of this network; check who sends it")
    if _HEAD.unpack(content[: _HEAD.size])[1] != round_:
        raise FileError(f"the masked update is not one of round {round_}; leave it out")
    planes = np.zeros((count, 4), np.uint8)
    planes[:, :width] = np.frombuffer(content[_HEAD.size :], np.uint8).reshape(count, width)
    return planes.view("<u4").reshape(-1).astype(np.uint32)


def write_table(table: Mapping[int, bytes]) -> bytes:
    """See the module."""
    return b"".join(n.to_bytes(4, "little") + part(content) for n, content in table.items())


def read_table(message: bytes, clients: int = _CLIENTS) -> dict[int, bytes]:
    """The inverse. Raises FileError for other bytes, and for more than `clients` can fill."""
    if len(message) > clients * _CELL:
        raise FileError(
            f"the table of clients has {len(message)} bytes where {clients * _CELL} are the most "
            f"for {clients} clients; leave out who sent it"
        )
    found: dict[int, bytes] = {}
    rest = memoryview(message)
    try:
        while len(rest):
            number = int.from_bytes(rest[:4], "little")
            content, following = parted(rest[4:])
            if number in found:
                raise ValueError(f"names client {number} twice")
            found[number], rest = bytes(content), memoryview(following)
    except ValueError as error:
        raise FileError(f"the table of clients {error}; have it sent again") from None
    return found
