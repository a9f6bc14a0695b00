"""Where the bytes of a file come from: a path, an open file, a pipe, or ranges of a remote one."""

from __future__ import annotations

import io
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tersor.codec.errors import Unreadable
from tersor.errors import FileError, OptionError

Data = bytes | memoryview

Place = Any
"""A path, an object with `read`, or a `Ranges`: whatever `opened` takes."""

_MAPPED = 2**20
"""Bytes from which a file is mapped instead of read."""


class Source(Protocol):
    """Bytes by their place. size: of all of them, None where only reading on would tell."""

    size: int | None

    def read(self, offset: int, length: int) -> Data:
        """As many bytes from `offset` as there are, at most `length`."""
        ...


class Memory:
    """Bytes at hand, or mapped."""

    def __init__(self, content: Data) -> None:
        self._view = memoryview(content)
        self.size: int | None = len(self._view)

    def read(self, offset: int, length: int) -> Data:
        return self._view[offset : offset + length]


class Ranges:
    """A file of which any range can be asked for, wherever it is.

    read_range: (offset, length) -> that many bytes; called by one thread at a time
    size: bytes of the whole file
    """

    def __init__(self, read_range: Callable[[int, int], bytes], size: int) -> None:
        self._read_range = read_range
        self.size: int | None = size

    def read(self, offset: int, length: int) -> Data:
        if self.size is not None:
            length = max(0, min(length, self.size - offset))
        if not length:
            return b""
        found = self._read_range(offset, length)
        if len(found) != length:
            raise Unreadable(f"{len(found)} bytes came where {length} were asked for")
        return found


class Pipe:
    """A stream that can only be read on."""

    size: int | None = None

    def __init__(self, stream: Any) -> None:
        self._stream, self._at = stream, 0

    def read(self, offset: int, length: int) -> Data:
        if offset != self._at:
            raise Unreadable("it comes through a pipe and would have to be read out of order")
        found = _read_fully(self._stream, length)
        self._at += len(found)
        return found


@contextmanager
def opened(place: Any) -> Iterator[Source]:
    """The source that `place` stands for.

    place: a path, an object with `read` (a binary file from its start on, or a pipe), a `Ranges`
    """
    if isinstance(place, str | os.PathLike):
        with _file(Path(place)) as source:
            yield source
    elif isinstance(place, Ranges | Memory | Pipe):
        yield place
    elif callable(getattr(place, "read", None)):
        yield _of_object(place)
    else:
        raise OptionError(
            f"{place!r:.60} is no file; give a path, a file opened with open(path, 'rb'), or "
            "tersor.codec.Ranges"
        )


def name_of(place: Any) -> str:
    """What errors call it."""
    if isinstance(place, str | os.PathLike):
        return str(place)
    return str(getattr(place, "name", None) or f"the given {type(place).__name__}")


def check_apart(out: Path, sources: Iterable[Place], said: str) -> None:
    """Raises OptionError, with what is `said`, where `out` is the path of one of its sources."""
    paths = (Path(place) for place in sources if isinstance(place, str | os.PathLike))
    if any(path.resolve() == out.resolve() for path in paths):
        raise OptionError(f"{said}; choose another name")


@contextmanager
def _file(path: Path) -> Iterator[Source]:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FileError("it is not a regular file; give the path of a .tersor file")
        if not status.st_size or status.st_size < _MAPPED:
            yield Memory(file.read())
            return
        # Unmapped when the last view of it is gone; closing it here would fail while one is left.
        yield Memory(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _of_object(file: Any) -> Source:
    if isinstance(file, io.TextIOBase):
        raise _no_bytes(file)
    seekable = getattr(file, "seekable", None)
    if seekable is None or not seekable():
        return Pipe(file)

    def read_range(offset: int, length: int) -> bytes:
        file.seek(offset)
        return _read_fully(file, length)

    return Ranges(read_range, file.seek(0, os.SEEK_END))


def _no_bytes(file: Any) -> OptionError:
    return OptionError(
        f"{name_of(file)} is open as text; open it for reading bytes: open(path, 'rb')"
    )


def _read_fully(file: Any, length: int) -> bytes:
    """Reads on until there are `length` bytes, or no more."""
    pieces, missing = [], length
    while missing:
        # Not all at once: a stream's end shows before memory for what it only claims is taken.
        piece = file.read(min(missing, 2**24))
        if not piece:
            break
        if isinstance(piece, str):
            raise _no_bytes(file)
        pieces.append(piece)
        missing -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
