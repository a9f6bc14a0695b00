"""Rounds in which the server sees no client's update, only their sum.

Changes are weighted by samples and rounded to whole numbers on one grid that all share; these are
summed under masks as in `secure`, so that the sum is exact. No coder makes masked numbers smaller:
an update takes as many bytes as the modulus has. How many samples a client has is told openly.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import Tensor

from tersor.errors import FileError, OptionError
from tersor.federated.agreement import X25519, Agreement, Entropy
from tersor.federated.client import Client
from tersor.federated.grid import (
    Secure,
    off_grid,
    on_grid,
    read_table,
    read_vector,
    write_table,
    write_vector,
)
from tersor.federated.messages import LostError
from tersor.federated.secure import Participant, checked_keys
from tersor.federated.talk import Talk
from tersor.federated.unmasking import SecureSum

KEYS, SHARES, UNSEALED, MASKED, REVEAL = "keys", "shares", "unsealed", "masked", "reveal"
_SAMPLES = struct.Struct("<I")


@dataclass
class Hidden:
    """A client whose updates the server may not read.

    number: as the server knows it
    agreement: how keys are agreed; X25519 by default, which takes the extra `federated`
    entropy: of keys and masks; anything but the default is for tests

    Raises OptionError for a client with a packing: no coder makes masked numbers smaller.
    """

    number: int
    client: Client
    secure: Secure
    agreement: Agreement = field(default_factory=X25519)
    entropy: Entropy = secrets.token_bytes

    def __post_init__(self) -> None:
        if self.client.packing is not None:
            raise OptionError(
                f"packing={self.client.packing!r}: a hidden update is as long as its modulus; make "
                "the client without, and choose bits and modulus_bits of Secure"
            )
        self._participant: Participant | None = None
        self._share = 0.0

    def answer(self, step: str, message: bytes) -> bytes:
        """To each step of a round in turn. Raises FileError for one out of turn."""
        if step == KEYS:
            try:
                self.client.receive(message)
            except LostError as lost:
                return lost.answer
            self._participant = Participant(
                self.number, agreement=self.agreement, entropy=self.entropy
            )
            return _SAMPLES.pack(self.client.samples) + self._participant.keys()
        if self._participant is None:
            raise FileError(f"the step {step!r} belongs to no round; begin with {KEYS!r}")
        if step == SHARES:
            return self._shares(self._participant, message)
        if step == UNSEALED:
            failed = self._participant.unsealed(read_table(message))
            return write_table(dict.fromkeys(failed, b""))
        if step == MASKED:
            return self._masked(self._participant, message)
        if step == REVEAL:
            return self._participant.reveal(read_table(message))
        raise FileError(f"the step {step!r} is unknown; use the same tersor at both ends")

    def _shares(self, participant: Participant, message: bytes) -> bytes:
        table = read_table(message)
        sizes = [int.from_bytes(content[: _SAMPLES.size], "little") for content in table.values()]
        self._share = self.client.samples / max(sizes, default=1)
        if not 0 < self._share <= 1:
            raise FileError("the server says of no client how many samples it has; begin anew")
        keys = {number: content[_SAMPLES.size :] for number, content in table.items()}
        return write_table(participant.shares(keys, threshold=self.secure.needed(len(keys))))

    def _masked(self, participant: Participant, message: bytes) -> bytes:
        change = [tensor * self._share for tensor in self.client.trained()]
        codes = on_grid(change, self.secure, self.client.generator)
        masked = participant.masked(codes, read_table(message))
        return write_vector(masked, self.client.round, self.secure.modulus_bits)


def hidden_mean(
    talk: Talk, chosen: Sequence[int], secure: Secure, agreement: Agreement | None = None
) -> list[Tensor] | None:
    """The mean of the changes of those who are heard to the end, by samples; None of too few.

    agreement: as the clients have it

    Raises OptionError where not even all of them could be summed.
    """
    agreement = agreement or X25519()
    secure.needed(len(chosen))
    samples, keys = _heard(talk, chosen, agreement)
    try:
        threshold = secure.needed(len(keys))
        boxes = _shared(talk, samples, keys)
        members = _understood(talk, boxes)
        size = talk.server.layout.numbers
        hub = SecureSum(keys, members, size=size, agreement=agreement)
        _collect(talk, hub, members, set(boxes) - members, secure)
        asked = write_table(dict.fromkeys(hub.arrived, b""))
        revealed = talk.ask(REVEAL, dict.fromkeys(hub.arrived, asked))
        total = hub.total(revealed, threshold=threshold)
    except (FileError, OptionError) as error:
        for number in set(keys) - set(talk.silent):
            talk.refused.setdefault(number, f"the sum was not opened: {error}")
        return None
    # One that fell silent behind its vector is in the sum all the same.
    talk.counted = hub.arrived
    for number in hub.arrived:
        talk.silent.pop(number, None)
    weight = sum(samples[number] for number in hub.arrived) / max(samples.values())
    return [tensor / weight for tensor in off_grid(total, secure, talk.server.layout)]


def _heard(
    talk: Talk, chosen: Sequence[int], agreement: Agreement
) -> tuple[dict[int, int], dict[int, bytes]]:
    """Samples and keys of those that begin the round."""
    samples, keys = {}, {}
    downloads = {number: talk.server.download(number) for number in chosen}
    probe = agreement.secret(secrets.token_bytes)
    for number, answer in talk.ask(KEYS, downloads).items():
        try:
            talk.server.check_followed(number, answer)
            count = int.from_bytes(answer[: _SAMPLES.size], "little")
            if not 1 <= count <= talk.server.most_samples:
                raise FileError(f"it claims {count} samples; check who sends that")
            key = checked_keys(answer[_SAMPLES.size :], agreement)
            # A key that fits nobody would silence all others when they meet it.
            for at in (0, agreement.public_size):
                agreement.agree(probe, key[at : at + agreement.public_size])
        except FileError as error:
            talk.refused[number] = str(error)
            continue
        talk.server.answered(number)
        samples[number], keys[number] = count, key
    return samples, keys


def _shared(
    talk: Talk, samples: Mapping[int, int], keys: Mapping[int, bytes]
) -> dict[int, dict[int, bytes]]:
    """By sender: the sealed shares for each receiver."""
    table = write_table({n: _SAMPLES.pack(samples[n]) + key for n, key in keys.items()})
    found = {}
    for number, answer in talk.ask(SHARES, dict.fromkeys(keys, table)).items():
        try:
            box = read_table(answer, len(keys))
            if set(box) != set(keys) - {number}:
                raise FileError(
                    "it does not share its secrets with each other client; leave it out"
                )
        except FileError as error:
            talk.refused[number] = str(error)
            continue
        found[number] = box
    return found


def _understood(talk: Talk, boxes: Mapping[int, Mapping[int, bytes]]) -> set[int]:
    """Who goes on: of any two of them each opened the other's shares."""
    asked = {
        number: write_table({n: box[number] for n, box in boxes.items() if n != number})
        for number in boxes
    }
    failed = {}
    for number, answer in talk.ask(UNSEALED, asked).items():
        try:
            failed[number] = set(read_table(answer, len(boxes)))
        except FileError as error:
            talk.refused[number] = str(error)
    out = left_out(failed)
    for number, others in out.items():
        talk.refused[number] = (
            f"its shares and those of clients {others} were not opened by each other; it is left "
            "out of this round"
        )
    return set(failed) - set(out)


def left_out(failed: Mapping[int, Set[int]]) -> dict[int, list[int]]:
    """Clients to be left out, each with those it is at odds with, until all that remain agree.

    failed: by receiver, the senders whose shares it could not open. Who is at odds with the most
    goes first, for one liar is at odds with all whom it harms; of two, the sender.
    """
    pairs = {(n, other) for n, others in failed.items() for other in others & failed.keys()}
    found: dict[int, list[int]] = {}
    while pairs := {pair for pair in pairs if not found.keys() & set(pair)}:
        odds = {n: {a + b - n for a, b in pairs if n in (a, b)} for pair in pairs for n in pair}
        senders = {sender for _, sender in pairs}
        worst = max(odds, key=lambda n: (len(odds[n]), n in senders, n))
        found[worst] = sorted(odds[worst])
    return found


def _collect(talk: Talk, hub: SecureSum, members: Set[int], out: Set[int], secure: Secure) -> None:
    """Takes in the masked vectors of members, which leave out the others."""
    asked = write_table(dict.fromkeys(sorted(out), b""))
    for number, answer in talk.ask(MASKED, dict.fromkeys(sorted(members), asked)).items():
        try:
            size, round_ = talk.server.layout.numbers, talk.server.round
            hub.add(number, read_vector(answer, size, round_, secure.modulus_bits))
        except FileError as error:
            talk.refused[number] = str(error)
