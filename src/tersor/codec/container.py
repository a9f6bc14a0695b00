"""The .tersor file as bytes: a preamble, two lines of JSON, chunks, and a checksum of it all.

docs/format.md has the rules and their reasons. Everything here treats a file as data from a
stranger: each length is compared with what the file can hold before anything of that length is
read, decompressed or allocated.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from tersor.codec.pack import Unreadable, expand
from tersor.errors import FileError, OutputError
from tersor.files import atomic

MAGIC = b"\x89TERSOR\n"
FILE_VERSION = 0
ALIGNMENT = 8
LARGEST_TEXT = 64 * 2**20
"""Most bytes of the header's JSON, and of the program's."""
MOST_VALUES = 2**22
"""Most values that the JSON may hold: a value is 50 times as large in memory as in JSON."""

# magic, version, flags, file length, length of the compressed JSON, lengths of its two lines
_PREAMBLE = struct.Struct("<8sIIQQII")
_DIGEST = 16
_TRAILER = 32
_START = _PREAMBLE.size + _DIGEST
_BLOCK = 2**20
_SPOOL = 64 * 2**20
_DAMAGED = "the file was damaged on its way or altered; get it again from where it came from"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a chunk lies. offset: from the end of the JSON, aligned; streams: their lengths"""

    offset: int
    streams: tuple[int, ...]
    digest: str

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return sum(self.streams)


@dataclass(frozen=True, slots=True)
class Text:
    """The JSON of a file, still as text, and where its chunks begin."""

    header: bytes
    program: bytes
    chunks_at: int
    file_bytes: int


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Turns what goes wrong while reading `path` into one FileError that names it."""
    try:
        yield
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    except Unreadable as error:
        raise FileError(f"{path} is not usable: {error}; {_DAMAGED}") from None
    except FileNotFoundError:
        raise FileError(f"{path} does not exist; check the path") from None
    except OSError as error:
        raise FileError(
            f"{path} cannot be read: {error.strerror or error}; give a .tersor file"
        ) from error


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The file and its length. Only regular files: others have no length to check against."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FileError("it is not a regular file; give the path of a .tersor file")
        yield file, status.st_size


def read_text(file: IO[bytes], file_bytes: int) -> Text:
    """Checks the preamble and reads the JSON behind it."""
    start = file.read(_START)
    stored, header, program = _checked_preamble(start, file_bytes)
    section = file.read(stored)
    if (
        len(section) != stored
        or _digest(start[: _PREAMBLE.size] + section) != start[_PREAMBLE.size :]
    ):
        raise Unreadable("the checksum of its header is wrong")
    text = expand(section, header + program)
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MOST_VALUES:
        raise Unreadable(f"its header holds more than {MOST_VALUES} values")
    return Text(text[:header], text[header:], _aligned(_START + stored), file_bytes)


def _checked_preamble(start: bytes, file_bytes: int) -> tuple[int, int, int]:
    """Lengths of the compressed JSON and of its two lines."""
    if start[:8] != MAGIC[: len(start)] or not start:
        raise FileError(
            f"it is not a .tersor file: it starts with {start[:8]!r} instead of {MAGIC!r}; give "
            "the file that tersor wrote"
        )
    if len(start) < _START:
        raise Unreadable(f"it ends after {file_bytes} bytes, inside its preamble")
    _, version, flags, length, stored, header, program = _PREAMBLE.unpack(start[: _PREAMBLE.size])
    if version > FILE_VERSION:
        raise FileError(
            f"it was written by a newer tersor (file version {version}, this one reads "
            f"{FILE_VERSION}); upgrade with `pip install -U tersor`"
        )
    if flags:
        raise Unreadable(f"its flags are {flags:#x} where version {version} knows none")
    if length != file_bytes:
        cut = "it was cut short" if file_bytes < length else "something was appended to it"
        raise Unreadable(f"it should be {length} bytes long and is {file_bytes}: {cut}")
    if _aligned(_START + stored) + _TRAILER > file_bytes:
        raise Unreadable(f"a header of {stored} bytes does not fit into its {file_bytes} bytes")
    if max(header, program) > LARGEST_TEXT:
        raise Unreadable(f"its header is longer than {LARGEST_TEXT} bytes")
    return stored, header, program


def read_chunks(
    file: IO[bytes], text: Text, chunks: Iterable[Stored]
) -> Iterator[list[memoryview]]:
    """Yields the streams of each chunk, and checks every byte of the file on the way.

    Only when the iterator is exhausted has the whole file been found intact.
    """
    file.seek(0)
    digest = hashlib.sha256(file.read(text.chunks_at))
    position = text.chunks_at
    last = text.file_bytes - _TRAILER
    for number, chunk in enumerate(chunks):
        begins = text.chunks_at + chunk.offset
        _check_place(number, begins, position, begins + chunk.size, last)
        padding = file.read(begins - position)
        content = file.read(chunk.size)
        if any(padding) or len(content) != chunk.size:
            raise Unreadable(f"the padding before chunk {number} is not zero")
        digest.update(padding)
        digest.update(content)
        if _digest(content).hex() != chunk.digest:
            raise Unreadable(f"the checksum of chunk {number} is wrong")
        yield _split(content, chunk.streams)
        position = begins + chunk.size
    if position != last:
        raise Unreadable(f"{last - position} bytes after its last chunk belong to nothing")
    if file.read(_TRAILER) != digest.digest():
        raise Unreadable("its checksum is wrong")


def _check_place(number: int, begins: int, position: int, ends: int, last: int) -> None:
    if begins < position:
        raise Unreadable(f"chunk {number} begins at byte {begins}, inside what ends at {position}")
    if begins != _aligned(position):
        raise Unreadable(f"between bytes {position} and {begins}, chunk {number}, lies a hole")
    if ends > last:
        raise Unreadable(f"chunk {number} ends at byte {ends}, behind the last one at {last}")


def _split(content: bytes, lengths: Iterable[int]) -> list[memoryview]:
    view, streams, at = memoryview(content), [], 0
    for length in lengths:
        streams.append(view[at : at + length])
        at += length
    return streams


def write(
    path: Path,
    header: dict[str, Any],
    program: bytes,
    chunks: Iterable[tuple[Any, list[bytes]]],
    check: Callable[[Path], None],
) -> None:
    """Writes a file in one piece or not at all; the header gets "chunks", the table of them.

    chunks: (what the table says first about a chunk, its streams), made one at a time
    check: is given the finished draft, and raises where it must not take the place of `path`
    """
    with atomic(path) as draft, tempfile.SpooledTemporaryFile(_SPOOL, dir=str(path.parent)) as body:
        table = [_append(body, about_it, streams) for about_it, streams in chunks]
        text = canonical(header | {"chunks": table})
        length = body.tell()
        body.seek(0)
        with draft.open("wb") as file:
            _write_all(file, text, program, body, length)
        check(draft)


def _append(body: IO[bytes], about_it: Any, streams: list[bytes]) -> list[Any]:
    body.write(bytes(-body.tell() % ALIGNMENT))
    offset = body.tell()
    for stream in streams:
        body.write(stream)
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for stream in streams:
        digest.update(stream)
    return [*about_it, offset, [len(s) for s in streams], digest.hexdigest()]


def _write_all(
    file: IO[bytes], header: bytes, program: bytes, body: IO[bytes], length: int
) -> None:
    if max(len(header), len(program)) > LARGEST_TEXT:
        raise OutputError(
            f"the model's description takes {max(len(header), len(program))} bytes, above "
            f"the limit of {LARGEST_TEXT}; save with graph=False or in several files"
        )
    section = zstandard.ZstdCompressor(level=19).compress(header + program)
    chunks_at = _aligned(_START + len(section))
    start = _PREAMBLE.pack(
        MAGIC,
        FILE_VERSION,
        0,
        chunks_at + length + _TRAILER,
        len(section),
        len(header),
        len(program),
    )
    digest = hashlib.sha256()
    padding = bytes(chunks_at - _START - len(section))
    pieces = (start, _digest(start + section), section, padding)
    for piece in (*pieces, *iter(lambda: body.read(_BLOCK), b"")):
        file.write(piece)
        digest.update(piece)
    file.write(digest.digest())


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()
