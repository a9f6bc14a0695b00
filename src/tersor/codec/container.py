"""The .tersor file as bytes: a preamble, a section of text with checksums, and chunks.

docs/format.md has the rules and their reasons. Everything here treats a file as data from a
stranger: each length is compared with what the file can hold before anything of that length is
read, decompressed or allocated.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.codec.errors import Unreadable
from tersor.codec.header import Run, run_json
from tersor.codec.source import Data, Source
from tersor.codec.text import expanded, squeezed
from tersor.errors import FileError, OutputError
from tersor.files import atomic

MAGIC = b"\x89TERSOR\n"
FILE_VERSION = 1
LARGEST_TEXT = 64 * 2**20
"""Most bytes of the header's JSON, and of the program's."""
MOST_CHUNKS = 2**20
MOST_VALUES = 2**22
"""Most values that the JSON may hold: a value is 50 times as large in memory as in JSON."""
FEATURES = {0: "changes from a base file"}
"""What a bit of the required features means."""

# magic, version, least version of a reader, required and optional features, length of the file,
# lengths of the squeezed text, of the header and of the program, number of chunks
_PREAMBLE = struct.Struct("<8s4HQ4I")
_IDENTITY, _DIGEST = 16, 8
START = _PREAMBLE.size + _IDENTITY
_BLOCK = 2**20
_SPOOL = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Text:
    """The JSON of a file, still as text, the checksums of its chunks, and where these begin."""

    header: bytes
    program: bytes
    digests: tuple[bytes, ...]
    chunks_at: int
    file_bytes: int
    features: int
    identity: str


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_of(content: Data) -> bytes:
    """The checksum of a chunk."""
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def read_text(source: Source) -> Text:
    """Checks the preamble and reads the section behind it."""
    start = bytes(source.read(0, START))
    features, length, stored, header, program, count = _checked_preamble(start, source.size)
    section = bytes(source.read(START, stored + _DIGEST * count))
    identity = _identity(start[: _PREAMBLE.size] + section)
    if len(section) != stored + _DIGEST * count or identity != start[_PREAMBLE.size :]:
        raise Unreadable("the checksum of its header is wrong")
    text = expanded(section[:stored], header + program)
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MOST_VALUES:
        raise Unreadable(f"its header holds more than {MOST_VALUES} values")
    digests = tuple(section[i : i + _DIGEST] for i in range(stored, len(section), _DIGEST))
    return Text(
        header=text[:header],
        program=text[header:],
        digests=digests,
        chunks_at=START + len(section),
        file_bytes=length,
        features=features,
        identity=identity.hex(),
    )


def _checked_preamble(start: bytes, size: int | None) -> tuple[int, int, int, int, int, int]:
    """Features, length of the file, of the text, the header and the program; number of chunks."""
    if start[:8] != MAGIC[: len(start)] or not start:
        raise FileError(
            f"it is not a .tersor file: it starts with {start[:8]!r} instead of {MAGIC!r}; give "
            "the file that tersor wrote"
        )
    if len(start) < START:
        raise Unreadable(f"it ends after {len(start)} bytes, inside its preamble")
    _, version, least, required, _, length, *rest = _PREAMBLE.unpack(start[: _PREAMBLE.size])
    _check_version(version, least, required)
    stored, header, program, count = rest
    if size is not None and length != size:
        cut = "it was cut short" if size < length else "something was appended to it"
        raise Unreadable(f"it should be {length} bytes long and is {size}: {cut}")
    if START + stored + _DIGEST * count > length:
        raise Unreadable(f"a header of {stored} bytes does not fit into its {length} bytes")
    if max(header, program) > LARGEST_TEXT or stored > header + program + 1:
        raise Unreadable(f"its header is longer than {LARGEST_TEXT} bytes")
    if count > MOST_CHUNKS:
        raise Unreadable(f"it has {count} chunks, above the limit of {MOST_CHUNKS}")
    return required, length, stored, header, program, count


def _check_version(version: int, least: int, required: int) -> None:
    upgrade = "upgrade with `pip install -U tersor`"
    if least > FILE_VERSION:
        raise FileError(
            f"it was written by a newer tersor (file version {version}, for readers of version "
            f"{least} on; this one reads {FILE_VERSION}); {upgrade}"
        )
    if version < FILE_VERSION or not least:
        raise FileError(
            f"it has file version {version}, from before tersor's first release; make it again "
            "from the original model"
        )
    unknown = [bit for bit in range(16) if required >> bit & 1 and bit not in FEATURES]
    if unknown:
        raise FileError(
            f"it needs feature {', '.join(map(str, unknown))} of file version {version}, which "
            f"this tersor does not know; {upgrade}"
        )


def write(
    path: Path,
    header: dict[str, Any],
    program: bytes,
    runs: Iterable[tuple[Run, list[bytes]]],
    check: Callable[[Path], None],
    features: int = 0,
) -> None:
    """Writes a file in one piece or not at all; the header gets "runs", the table of them.

    runs: with their chunks, made one at a time
    check: is given the finished draft, and raises where it must not take the place of `path`
    """
    with atomic(path) as draft, tempfile.SpooledTemporaryFile(_SPOOL, dir=str(path.parent)) as body:
        table, digests = [], []
        for run, chunks in runs:
            table.append(run_json(run))
            for chunk in chunks:
                digests.append(digest_of(chunk))
                body.write(chunk)
        text = canonical(header | ({"runs": table} if table else {}))
        length = body.tell()
        body.seek(0)
        with draft.open("wb") as file:
            file.write(_front(text, program, digests, length, features))
            for piece in iter(lambda: body.read(_BLOCK), b""):
                file.write(piece)
        check(draft)


def _front(
    header: bytes, program: bytes, digests: list[bytes], length: int, features: int
) -> bytes:
    """Everything before the chunks, which take `length` bytes."""
    longest = max(len(header), len(program))
    if longest > LARGEST_TEXT:
        raise OutputError(
            f"the model's description takes {longest} bytes, above the limit of {LARGEST_TEXT}; "
            "save with graph=False or in several files"
        )
    text = squeezed(header + program)
    section = text + b"".join(digests)
    start = _PREAMBLE.pack(
        MAGIC,
        FILE_VERSION,
        FILE_VERSION,
        features,
        0,
        START + len(section) + length,
        len(text),
        len(header),
        len(program),
        len(digests),
    )
    return start + _identity(start + section) + section


def _identity(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_IDENTITY).digest()
