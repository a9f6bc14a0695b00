"""A sum whose terms nobody sees: each client hides its vector under masks that cancel.

A round has four steps, each with one message from each client: `keys`, `shares`, `masked`,
`reveal`. A client may fall silent behind any of them, as long as `threshold` remain; the sum is
then, exactly, of those whose masked vector has arrived.

What it keeps secret: a server that follows the steps, together with up to `threshold - 1` clients,
learns the sum of the others' vectors and nothing else of them. A client answers `reveal` once, with
one kind of share for each other client, so that no late message can be unmasked on its own.

What it does not: keys are not signed here, so a server that swaps them for its own, or that tells
different clients of different drop-outs, can open a vector: that takes signed keys and the
consistency round of the paper, which the caller must bring. A sum of few vectors says much about
each; who takes part, and how large vectors are, is seen. Clients are trusted with what they put in:
a masked vector cannot be checked, and one bad client can spoil the sum (not silently where it lies
about shares: those are compared with what it committed itself to).

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning", CCS 2017, figure 4, without the consistency check; masks are of SHAKE-256.
Differs from the paper: clients commit themselves to the seeds of their own masks.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tersor.errors import FileError
from tersor.federated import shamir
from tersor.federated.agreement import Agreement, Entropy, seal, unseal
from tersor.federated.options import check_count

Vector = np.ndarray[Any, np.dtype[np.uint32]]
_SEED, _HASH = 32, 16
_KINDS = (b"\0", b"\1")
"""Of a revealed share: of the secret behind a silent client's masks, of a heard one's own seed."""


def least_threshold(clients: int) -> int:
    """Two thirds of the clients: a third may fall silent."""
    return max(2, math.ceil(2 * clients / 3))


class Participant:
    """One client's side of one round. Keys and seeds are new in every round.

    number: of the client, from 0
    """

    def __init__(
        self,
        number: int,
        *,
        agreement: Agreement,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        """entropy: gives so many random bytes; anything but the default is for tests."""
        self.number = number
        self._agreement, self._entropy = agreement, entropy
        self._threshold = 2
        # One key seals shares, the other seeds masks: only the second may have to be revealed.
        self._sealing, self._masking = agreement.secret(entropy), agreement.secret(entropy)
        self._seed = entropy(_SEED)
        self._others: dict[int, bytes] = {}
        self._held: dict[int, bytes] = {}
        self._sent = self._revealed = False

    def keys(self) -> bytes:
        """Both public keys, and a hash that its own seed must have."""
        public = (self._agreement.public(key) for key in (self._sealing, self._masking))
        return b"".join(public) + _committed(self._seed)

    def shares(self, keys: Mapping[int, bytes], *, threshold: int) -> dict[int, bytes]:
        """For each other client, its shares of this one's secrets, sealed.

        keys: of all clients that are heard, by number
        threshold: clients that must remain to open the sum, at least 2; all agree on it beforehand

        Raises FileError for a second call: among other clients, fewer would open what is shared.
        """
        check_count("threshold", threshold, least=2)
        if self._others:
            raise FileError("this client has shared its secrets of the round; begin a new one")
        self._threshold = threshold
        if len(keys) < threshold:
            raise _too_few(len(keys), threshold)
        self._others = {
            number: checked_keys(key, self._agreement) for number, key in sorted(keys.items())
        }
        split = [
            shamir.split(secret, len(keys), threshold=self._threshold, entropy=self._entropy)
            for secret in (self._masking, self._seed)
        ]
        found = {}
        for number, first, second in zip(self._others, *split, strict=True):
            if number == self.number:
                self._held[number] = first + second
            else:
                key = self._agreement.agree(self._sealing, self._sealing_key(number))
                found[number] = seal(first + second, key, self.number, number)
        return found

    def masked(self, vector: Vector, sealed: Mapping[int, bytes]) -> Vector:
        """The vector under its masks, modulo 2**32.

        sealed: the shares that other clients had for this one, by their numbers. Raises FileError
        for shares that were altered, where fewer than the threshold are heard, and for a second
        call: two vectors under the same masks would show how they differ.
        """
        if self._sent:
            raise FileError("this client has sent its vector of the round; begin a new one")
        if len(sealed) + 1 < self._threshold:
            raise _too_few(len(sealed) + 1, self._threshold)
        found = vector + mask(self._seed, len(vector))
        for number, content in sealed.items():
            key = self._agreement.agree(self._sealing, self._sealing_key(number))
            pair = unseal(content, key, number, self.number)
            if len(pair) != 2 * shamir.SIZE:
                raise FileError(f"client {number} sent no pair of shares; leave it out")
            self._held[number] = pair
            seed = self._agreement.agree(self._masking, self._masking_key(number))
            found += signed(mask(seed, len(vector)), self.number, number)
        self._sent = True
        return found

    def reveal(self, arrived: Iterable[int]) -> bytes:
        """Shares that open the sum of those whose masked vector has arrived, and nothing else.

        Raises FileError for a second call, and where fewer than the threshold arrived: together
        the answers would open single vectors.
        """
        heard = set(arrived) & set(self._held)
        if len(heard) < self._threshold:
            raise _too_few(len(heard), self._threshold)
        if self._revealed:
            raise FileError("this client has revealed its shares of the round; begin a new one")
        self._revealed = True
        parts = []
        for number, pair in sorted(self._held.items()):
            kind = number in heard
            part = pair[shamir.SIZE :] if kind else pair[: shamir.SIZE]
            parts.append(number.to_bytes(4, "little") + _KINDS[kind] + part)
        return b"".join(parts)

    def _sealing_key(self, number: int) -> bytes:
        return self._key(number)[: self._agreement.public_size]

    def _masking_key(self, number: int) -> bytes:
        return self._key(number)[self._agreement.public_size : 2 * self._agreement.public_size]

    def _key(self, number: int) -> bytes:
        if number not in self._others or number == self.number:
            raise FileError(f"client {number} sent no keys for this round; leave it out")
        return self._others[number]


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

        revealed: what clients answered to `reveal`, by number. Raises FileError where fewer than
        the threshold did, or where their shares do not open the masks.
        """
        if len(revealed) < threshold:
            raise _too_few(len(revealed), threshold)
        shares = [_read_shares(content, set(self._shared)) for content in revealed.values()]
        # A share's number is the place of its holder among those with keys.
        places = {number: x for x, number in enumerate(self._keys, 1)}
        holders = [places[number] for number in revealed]
        found = self._sum.copy()
        for number in self._shared:
            kind = number in self.arrived
            own = {
                x: given[number, kind]
                for x, given in zip(holders, shares, strict=True)
                if (number, kind) in given
            }
            if len(own) < threshold:
                raise _too_few(len(own), threshold)
            if kind:
                found -= mask(self._seed(number, own), self._size)
            else:
                self._take_out(number, own, found)
        return found

    def _seed(self, number: int, shares: Mapping[int, bytes]) -> bytes:
        seed = shamir.join(shares, _SEED)
        if _committed(seed) != self._keys[number][2 * self._agreement.public_size :]:
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


def mask(seed: bytes, count: int) -> Vector:
    """Numbers modulo 2**32 that nobody without the seed tells from random ones."""
    stream = hashlib.shake_256(b"tersor mask" + seed).digest(4 * count)
    return np.frombuffer(stream, "<u4").astype(np.uint32)


def signed(found: Vector, one: int, other: int) -> Vector:
    """A pair's mask as `one` adds it: `other` adds what cancels it."""
    return found if one < other else np.negative(found)


def _committed(seed: bytes) -> bytes:
    return hashlib.blake2b(b"tersor seed" + seed, digest_size=_HASH).digest()


def checked_keys(key: bytes, agreement: Agreement) -> bytes:
    """What `Participant.keys` gives. Raises FileError for another length."""
    wanted = 2 * agreement.public_size + _HASH
    if len(key) != wanted:
        raise FileError(
            f"keys have {len(key)} bytes where {wanted} are needed; leave out who sent them"
        )
    return key


def _read_shares(content: bytes, known: set[int]) -> dict[tuple[int, bool], bytes]:
    """By (client, whether it was heard). Raises FileError for what no client reveals."""
    size = 5 + shamir.SIZE
    if len(content) > size * len(known):
        raise FileError(
            f"revealed shares are of more than the {len(known)} clients of this round; leave out "
            "who sent them"
        )
    found: dict[tuple[int, bool], bytes] = {}
    for at in range(0, len(content), size):
        piece = content[at : at + size]
        number, kind = int.from_bytes(piece[:4], "little"), piece[4:5]
        if len(piece) < size or number not in known or kind not in _KINDS:
            raise FileError(
                "revealed shares are of no client of this round; leave out who sent them"
            )
        found[number, kind == _KINDS[1]] = piece[5:]
    return found


def _too_few(found: int, threshold: int) -> FileError:
    return FileError(
        f"{found} clients are left where threshold={threshold} are needed; begin a new round"
    )


def _wrong_shares(number: int) -> FileError:
    return FileError(
        f"the shares of client {number}'s secrets give another one than it committed itself to; "
        "some client lies, begin a new round"
    )
