"""Gives one file to the loader and judges what it did: refuse, load, or what no reader may do."""

import io
import math
import random
import resource
import time
import warnings
from pathlib import Path

from fuzz_mutants import Mutant
from fuzz_seeds import Seed
from tersor.codec import Header, load, read_header, read_tensor
from tersor.errors import FileError, OptionError

OUTCOMES = ("refused", "loaded", "read", "not there", "above the limit", "finding")
SECONDS = 2.0
SECONDS_FOR_ELEMENT = 4e-6
"""With the sanitizers, which make the slowest coder ten times as slow."""
ALWAYS = 640 * 2**20 + 4 * 2**20
"""Bytes that any file may take on one thread: docs/format.md, "Kinds, runs, chunks"."""
_SLACK = 64 * 2**20
_SHADOW = 1.25
"""What the sanitizers and the allocators add."""


class Finding(Exception):
    """What a reader must not do, whatever it is given."""


class Pipe(io.RawIOBase):
    """Bytes that can only be read on."""

    def __init__(self, content: bytes) -> None:
        self._rest = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        """As a file does."""
        return self._rest.read(size)


class Judge:
    """Reads mutants in this process.

    most: bytes of address space that reading may add, or None; that it needs more is a finding
        where the format says that it may not
    """

    def __init__(self, seeds: list[Seed], most: int | None = None) -> None:
        self._names = {seed.name: _names(seed) for seed in seeds}
        self._most = most
        warnings.simplefilter("ignore")
        _forget_peak()
        self._before = self._peak = _resident()
        if most is not None:
            limit = _pages()[0] + most
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def outcome(self, mutant: Mutant, number: int) -> str:
        """One of OUTCOMES but the last. Raises Finding."""
        begin = time.process_time()
        found = self._read(mutant, number)
        seconds = time.process_time() - begin
        if seconds > SECONDS:
            allowed = SECONDS + SECONDS_FOR_ELEMENT * _elements(mutant)
            if seconds > allowed:
                raise Finding(f"took {seconds:.1f} s of the processor, above {allowed:.1f} s")
        self._check_memory(mutant)
        return found

    def _read(self, mutant: Mutant, number: int) -> str:
        choose = random.Random(number)
        base = None if mutant.base is None else io.BytesIO(mutant.base)
        way = choose.random()
        try:
            if way < 0.5:
                load(io.BytesIO(mutant.content), base=base, threads=1)
                return "loaded"
            if way < 0.6:
                load(Pipe(mutant.content), base=base, threads=1)
                return "loaded"
            name, rows = choose.choice(self._names[mutant.seed])
            some = None
            if rows is not None and way < 0.9:
                first = choose.randrange(rows + 1)
                some = slice(first, choose.randrange(first, rows + 2))
            read_tensor(io.BytesIO(mutant.content), name, some, base=base)
            return "read"
        except FileError:
            return "refused"
        except OptionError as error:
            # The caller's, who asked for what a mutant no longer has.
            if way >= 0.6 and str(error).startswith(("there is no tensor", "rows=")):
                return "not there"
            raise Finding(f"raised {error!r}") from error
        except MemoryError as error:
            if self._most is not None and stated_bound(mutant) > self._most:
                return "above the limit"
            raise Finding(f"raised {error!r}") from error
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise Finding(f"raised {error!r:.300}") from error

    def _check_memory(self, mutant: Mutant) -> None:
        peak = _resident()
        if peak <= self._peak + _SLACK:
            return
        taken, bound = peak - self._before, stated_bound(mutant)
        if not _forget_peak():
            self._peak = peak
        if taken > bound * _SHADOW + _SLACK:
            raise Finding(f"took {taken >> 20} MiB, above the {bound >> 20} MiB of docs/format.md")


def stated_bound(mutant: Mutant) -> int:
    """Bytes that docs/format.md lets a reader take for a file on one thread."""
    total = ALWAYS
    for content in filter(None, (mutant.content, mutant.base)):
        header = _header(content)
        if header is not None:
            total += _unfolded(header)
    return total


def _unfolded(header: Header) -> int:
    """Bytes of its tensors, wider ones while they are made, and of the weights they stand for."""
    total = 0
    for leaf in header.leaves:
        stored = leaf.plain.count * header.dtype(leaf.plain).itemsize
        total += stored * (9 if leaf.mask or leaf.zero else 2)
    for entry in header.entries:
        total += math.prod(entry.tensor.shape) * 8
    return total


def _elements(mutant: Mutant) -> int:
    header = _header(mutant.content)
    return 0 if header is None else sum(leaf.matrix.size for leaf in header.leaves)


def _header(content: bytes) -> Header | None:
    try:
        return read_header(io.BytesIO(content))
    except FileError:
        return None


def _names(seed: Seed) -> list[tuple[str, int | None]]:
    """Each tensor of a file, and how many rows it has."""
    return [
        (name, entry.tensor.shape[0] if entry.tensor.shape else None)
        for entry in read_header(io.BytesIO(seed.content)).entries
        for name in entry.names
    ]


def _resident() -> int:
    """Most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _pages() -> list[int]:
    """Bytes of address space, and in memory."""
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return [int(field) * resource.getpagesize() for field in fields[:2]]


def _forget_peak() -> bool:
    """Begins to measure anew, where the system lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
