"""The server's side of a sum whose terms nobody sees; `secure` has the clients' and the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np

from tersor.errors import FileError
from tersor.federated import shamir
from tersor.federated.agreement import Agreement
from tersor.federated.secure import (
    KINDS,
    SEED,
    Vector,
    checked_keys,
    committed,
    mask,
    signed,
    too_few,
)

Shares: TypeAlias = dict[tuple[int, bool], bytes]
"""What one client revealed, by (client, whether it was heard)."""


class SecureSum:
    """The server's side of one round: it carries messages and opens the sum.

    keys: of all clients that are heard, by number. Raises FileError for one that is none.
    shared: those of them whose shares arrived
    """

    def __init__(
        self, keys: Mapping[int, bytes], shared: Iterable[int], *, size: int, agreement: Agreement
    ) -> None:
        """size: numbers in a vector."""
        self._keys = {number: checked_keys(key, agreement) for number, key in sorted(keys.items())}
        self._shared = sorted(set(shared))
        self._size, self._agreement = size, agreement
        self._sum = np.zeros(size, np.uint32)
        self.arrived: list[int] = []

    def add(self, number: int, vector: Vector) -> None:
        """Takes a masked vector. Raises FileError for one that does not fit."""
        if number not in self._shared or number in self.arrived:
            raise FileError(f"client {number} has no vector to send in this step; leave it out")
        if vector.shape != (self._size,) or vector.dtype != np.uint32:
            raise FileError(
                f"the vector of client {number} has {vector.size} numbers where {self._size} are "
                "summed; leave it out"
            )
        self._sum += vector
        self.arrived.append(number)

    def total(self, revealed: Mapping[int, bytes], *, threshold: int) -> Vector:
        """The sum of what has arrived, modulo 2**32.

        revealed: what clients answered to `reveal`, by number; what cannot be read is left out.
        Raises FileError where fewer than the threshold remain, with the numbers of those left out,
        or where their shares do not open the masks.
        """
        shares = self._readable(revealed, threshold)
        found = self._sum.copy()
        for number in self._shared:
            kind = number in self.arrived
            own = {x: given[number, kind] for x, given in shares.items() if (number, kind) in given}
            if len(own) < threshold:
                raise too_few(len(own), threshold)
            if kind:
                found -= mask(self._seed(number, own), self._size)
            else:
                self._take_out(number, own, found)
        return found

    def _readable(self, revealed: Mapping[int, bytes], threshold: int) -> dict[int, Shares]:
        """By the number of the share: its holder's place among those with keys."""
        places = {number: x for x, number in enumerate(self._keys, 1)}
        found: dict[int, Shares] = {}
        bad = []
        for number, content in revealed.items():
            try:
                found[places[number]] = _read_shares(content, set(self._shared))
            except FileError:
                bad.append(number)
        if len(found) < threshold:
            raise too_few(len(found), threshold, unreadable=bad)
        return found

    def _seed(self, number: int, shares: Mapping[int, bytes]) -> bytes:
        seed = shamir.join(shares, SEED)
        if committed(seed) != self._keys[number][2 * self._agreement.public_size :]:
            raise _wrong_shares(number)
        return seed

    def _take_out(self, silent: int, shares: Mapping[int, bytes], found: Vector) -> None:
        """Masks that others share with a silent client and that its own do not cancel."""
        size = self._agreement.public_size
        secret = shamir.join(shares, self._agreement.secret_size)
        if self._agreement.public(secret) != self._keys[silent][size : 2 * size]:
            raise _wrong_shares(silent)
        for number in self.arrived:
            seed = self._agreement.agree(secret, self._keys[number][size : 2 * size])
            found -= signed(mask(seed, self._size), number, silent)


def _read_shares(content: bytes, known: set[int]) -> Shares:
    """By (client, whether it was heard). Raises FileError for what no client reveals."""
    size = 5 + shamir.SIZE
    if len(content) > size * len(known):
        raise FileError(
            f"revealed shares are of more than the {len(known)} clients of this round; leave out "
            "who sent them"
        )
    found: Shares = {}
    for at in range(0, len(content), size):
        piece = content[at : at + size]
        number, kind = int.from_bytes(piece[:4], "little"), piece[4:5]
        if len(piece) < size or number not in known or kind not in KINDS:
            raise FileError(
                "revealed shares are of no client of this round; leave out who sent them"
            )
        found[number, kind == KINDS[1]] = piece[5:]
    return found


def _wrong_shares(number: int) -> FileError:
    return FileError(
        f"the shares of client {number}'s secrets give another one than it committed itself to; "
        "some client lies, begin a new round"
    )
