"""A sum whose terms nobody sees: each client hides its vector under masks that cancel.

A round has five steps, each with one message from each client: `keys`, `shares`, `unsealed`,
`masked`, `reveal`. A client may fall silent behind any of them, as long as `threshold` remain; the
sum is then, exactly, of those whose masked vector has arrived.

What it keeps secret: a server that follows the steps, together with up to `threshold - 1` clients,
learns the sum of the others' vectors and nothing else of them. A client answers `reveal` once, with
one kind of share for each other client, so that no late message can be unmasked on its own.

`SecureSum` in `unmasking` is the server's side.

What it does not: keys are not signed here, so a server that swaps them for its own, or that tells
different clients of different drop-outs, can open a vector: that takes signed keys and the
consistency round of the paper, which the caller must bring. A sum of few vectors says much about
each; who takes part, and how large vectors are, is seen. Clients are trusted with what they put in:
a masked vector cannot be checked, and one bad client can spoil the sum (not silently where it lies
about shares: those are compared with what it committed itself to).

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine
Learning", CCS 2017, figure 4, without the consistency check; masks are of SHAKE-256.
Differs from the paper: clients commit themselves to the seeds of their own masks, and say whose
shares they cannot open before anything is masked, where the paper's abort.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tersor.errors import FileError
from tersor.federated import shamir
from tersor.federated.agreement import Agreement, Entropy, seal, unseal
from tersor.federated.options import check_count

Vector = np.ndarray[Any, np.dtype[np.uint32]]
SEED, _HASH = 32, 16
KINDS = (b"\0", b"\1")
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
        self._seed = entropy(SEED)
        self._others: dict[int, bytes] = {}
        self._held: dict[int, bytes] = {}
        self._opened = self._sent = self._revealed = False

    def keys(self) -> bytes:
        """Both public keys, and a hash that its own seed must have."""
        public = (self._agreement.public(key) for key in (self._sealing, self._masking))
        return b"".join(public) + committed(self._seed)

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
            raise too_few(len(keys), threshold)
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

    def unsealed(self, sealed: Mapping[int, bytes]) -> list[int]:
        """Opens the shares that other clients had for this one; those whose do not open.

        sealed: by their numbers. Raises FileError for one without keys, and for a second call.
        """
        if self._opened:
            raise FileError("this client has opened its shares of the round; begin a new one")
        self._opened = True
        failed = []
        for number, content in sealed.items():
            key = self._sealing_key(number)
            try:
                pair = unseal(
                    content, self._agreement.agree(self._sealing, key), number, self.number
                )
            except FileError:
                pair = b""
            if len(pair) == 2 * shamir.SIZE:
                self._held[number] = pair
            else:
                failed.append(number)
        return failed

    def masked(self, vector: Vector, without: Iterable[int] = ()) -> Vector:
        """The vector under the masks of those whose shares were opened, modulo 2**32.

        without: those of them that are left out of the round. Raises FileError where fewer than the
        threshold are left, and for a second call: two vectors under the same masks would show how
        they differ.
        """
        if self._sent:
            raise FileError("this client has sent its vector of the round; begin a new one")
        out = set(without) - {self.number}
        held = {number: pair for number, pair in self._held.items() if number not in out}
        if len(held) < self._threshold:
            raise too_few(len(held), self._threshold)
        found = vector + mask(self._seed, len(vector))
        for number in held.keys() - {self.number}:
            seed = self._agreement.agree(self._masking, self._masking_key(number))
            found += signed(mask(seed, len(vector)), self.number, number)
        # Nothing is revealed of who is left out.
        self._held, self._sent = held, True
        return found

    def reveal(self, arrived: Iterable[int]) -> bytes:
        """Shares that open the sum of those whose masked vector has arrived, and nothing else.

        Raises FileError for a second call, and where fewer than the threshold arrived: together
        the answers would open single vectors.
        """
        heard = set(arrived) & set(self._held)
        if len(heard) < self._threshold:
            raise too_few(len(heard), self._threshold)
        if self._revealed:
            raise FileError("this client has revealed its shares of the round; begin a new one")
        self._revealed = True
        parts = []
        for number, pair in sorted(self._held.items()):
            kind = number in heard
            part = pair[shamir.SIZE :] if kind else pair[: shamir.SIZE]
            parts.append(number.to_bytes(4, "little") + KINDS[kind] + part)
        return b"".join(parts)

    def _sealing_key(self, number: int) -> bytes:
        return self._key(number)[: self._agreement.public_size]

    def _masking_key(self, number: int) -> bytes:
        return self._key(number)[self._agreement.public_size : 2 * self._agreement.public_size]

    def _key(self, number: int) -> bytes:
        if number not in self._others or number == self.number:
            raise FileError(f"client {number} sent no keys for this round; leave it out")
        return self._others[number]


def mask(seed: bytes, count: int) -> Vector:
    """Numbers modulo 2**32 that nobody without the seed tells from random ones."""
    stream = hashlib.shake_256(b"tersor mask" + seed).digest(4 * count)
    return np.frombuffer(stream, "<u4").astype(np.uint32)


def signed(found: Vector, one: int, other: int) -> Vector:
    """A pair's mask as `one` adds it: `other` adds what cancels it."""
    return found if one < other else np.negative(found)


def committed(seed: bytes) -> bytes:
    """A hash that says nothing of the seed, and that no other seed has."""
    return hashlib.blake2b(b"tersor seed" + seed, digest_size=_HASH).digest()


def checked_keys(key: bytes, agreement: Agreement) -> bytes:
    """What `Participant.keys` gives. Raises FileError for another length."""
    wanted = 2 * agreement.public_size + _HASH
    if len(key) != wanted:
        raise FileError(
            f"keys have {len(key)} bytes where {wanted} are needed; leave out who sent them"
        )
    return key


def too_few(found: int, threshold: int, *, unreadable: Sequence[int] = ()) -> FileError:
    """unreadable: clients whose answers are of no use."""
    bad = f" once the unreadable shares of clients {list(unreadable)} are left out"
    return FileError(
        f"{found} clients are left where threshold={threshold} are needed"
        f"{bad if unreadable else ''}; begin a new round"
    )
