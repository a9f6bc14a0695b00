"""What the ends send each other, as bytes: updates go up, states and updates come down.

Everything is read as data from strangers: no pickle, no shape, no length that is not checked
against what the reader knows. The closing checksum finds damage and no forgery; that is what the
connection (TLS, signed clients) is for.

An update: "tfu1", the round (4 bytes, little-endian as all that follows), the identity of the
state it starts from (8), the samples it was trained on (4), a body, and a CRC-32 of all that.

A download: "tfd1", the round (4), one more than the round in which an update of this client was
last counted (4), the version of the state that the first body is a change of (4; `FULL` where it
is a whole state), the identity of the state at the end (8), bodies as parts, and a CRC-32. There is
one body for each round from that version on; a whole state is one body, or one for the start and
one for each round behind it.

A client that cannot follow a download answers "tfl1", the round (4), and a CRC-32.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tersor.codec.coders.static import part, parted
from tersor.errors import FileError
from tersor.federated.layout import Layout
from tersor.federated.packing import longest_body, unpack

_UPDATE = struct.Struct("<4sI8sI")
_DOWNLOAD = struct.Struct("<4sIII8s")
_LOST = struct.Struct("<4sI")
_CHECK = struct.Struct("<I")
_UP, _DOWN, _ASTRAY = b"tfu1", b"tfd1", b"tfl1"
FULL = 2**32 - 1
"""In place of a version: what comes is the whole state."""
MOST_BODIES = 256
"""In a download. Each may be a few bytes that take work of the network's size to read."""


class LostError(FileError):
    """A client cannot follow the changes it was sent.

    answer: what asks the server for the whole state
    """

    def __init__(self, reason: str, round_: int) -> None:
        super().__init__(f"{reason}; ask for the whole state")
        self.answer = _astray(round_)


@dataclass(frozen=True)
class Update:
    """One client's answer.

    samples: that it was trained on
    change: of trained tensors; statistics are values
    """

    samples: int
    change: list[Tensor]


@dataclass(frozen=True)
class Download:
    """What a client needs to begin a round.

    counted: one more than the last round in which its update was counted, 0 before
    first: the version that the first body changes, or `FULL`
    """

    round: int
    counted: int
    first: int
    identity: bytes
    bodies: list[bytes]


def write_update(round_: int, start: bytes, samples: int, body: bytes) -> bytes:
    """See the module. start: identity of the state that training began with."""
    return sealed(_UPDATE.pack(_UP, round_, start, samples) + body)


def read_update(
    message: bytes, layout: Layout, *, round_: int, start: bytes, most_samples: int
) -> Update:
    """Raises FileError, with the reason, for any bytes that are not an update of this round.

    most_samples: a client that says it has more is refused, since it would outweigh all others
    """
    content = opened(message, _UPDATE.size + longest_body(layout), "update")
    if len(content) < _UPDATE.size or bytes(content[:4]) != _UP:
        raise FileError("the message is no update of a tersor client; check who sends it")
    _, round_found, start_found, samples = _UPDATE.unpack(content[: _UPDATE.size])
    if round_found != round_:
        raise FileError(
            f"the update is one of round {round_found} and not of {round_}; leave it out"
        )
    if start_found != start:
        raise FileError(
            "the update starts from another state than this round's; have the client load it whole"
        )
    if not 1 <= samples <= most_samples:
        raise FileError(
            f"the update claims {samples} samples, of 1 to {most_samples} that are allowed; raise "
            "most_samples if that is true"
        )
    return Update(samples, unpack(content[_UPDATE.size :], layout))


def is_lost(message: bytes, round_: int) -> bool:
    """Whether a client says that it cannot follow this round's download."""
    return message == _astray(round_)


def write_download(download: Download) -> bytes:
    """See the module."""
    head = _DOWNLOAD.pack(
        _DOWN, download.round, download.counted, download.first, download.identity
    )
    return sealed(head + b"".join(part(body) for body in download.bodies))


def read_download(message: bytes, layout: Layout) -> Download:
    """Raises FileError for bytes that no server writes. Bodies are not read yet."""
    # A server sends missed changes only while they are shorter than the state.
    content = opened(message, _DOWNLOAD.size + 2 * longest_body(layout), "download")
    if len(content) < _DOWNLOAD.size or bytes(content[:4]) != _DOWN:
        raise FileError("the message is no download of a tersor server; check who sends it")
    _, round_, counted, first, identity = _DOWNLOAD.unpack(content[: _DOWNLOAD.size])
    rest: bytes | memoryview = content[_DOWNLOAD.size :]
    bodies = []
    try:
        while len(rest):
            body, rest = parted(rest)
            bodies.append(bytes(body))
    except ValueError as error:
        raise FileError(f"the download {error}; ask for it again") from None
    _check_bodies(len(bodies), round_, first)
    return Download(round_, counted, first, identity, bodies)


def _astray(round_: int) -> bytes:
    return sealed(_LOST.pack(_ASTRAY, round_))


def _check_bodies(found: int, round_: int, first: int) -> None:
    whole = first == FULL
    due = {1, round_ + 1} if whole else {round_ - first}
    if found not in due or found > MOST_BODIES:
        start = "a whole state" if whole else f"changes from state {first}"
        raise FileError(
            f"the download has {found} bodies, which is not what {start} to round {round_} takes "
            f"(at most {MOST_BODIES}); ask for it again"
        )


def changed(state: Sequence[Tensor], body: bytes, layout: Layout) -> list[Tensor]:
    """A state after the change of a body. Raises FileError for a body that is damaged."""
    found = unpack(body, layout)
    trained = [s + c for s, c in zip(state, found[: layout.trained], strict=False)]
    return trained + found[layout.trained :]


def sealed(content: bytes) -> bytes:
    """The content and its checksum."""
    return content + _CHECK.pack(zlib.crc32(content))


def opened(message: bytes, most: int, what: str) -> memoryview:
    """The inverse. Raises FileError for a message that is damaged or has over `most` bytes."""
    if len(message) > most + _CHECK.size:
        raise FileError(
            f"the {what} has {len(message)} bytes where {most + _CHECK.size} are the most for this "
            "network; check that both ends have the same one"
        )
    content, check = memoryview(message)[: -_CHECK.size], message[-_CHECK.size :]
    if len(message) < _CHECK.size or _CHECK.pack(zlib.crc32(content)) != check:
        raise FileError(f"the {what} was damaged on its way (checksum); have it sent again")
    return content
