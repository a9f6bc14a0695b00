"""Makes altered files out of whole ones: damaged anyhow, or with every checksum right again."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zstandard

from attacks.forge import PREAMBLE, VOCABULARY, Pieces
from fuzz_seeds import Seed

EDGES = [0, 1, 2, 3, 4, 7, 8, 16, 63, 64, 65, 127, 128, 255, 256, 4096, 65535, 65536, 65537]
HUGE = [2**20, 2**24, 2**24 + 1, 2**28, 2**30, 2**31 - 1, 2**31, 2**32, 2**40, 2**41, 2**62, 2**63]
HUGE += [2**64, 10**25, 10**400]
TEXTS = ["", "x", ".", "0", "0.weight", "a..b", "__class__", "forward", "\n", "\x00", "\ud800"]
TEXTS += ["=", "0000803f", "^1", "^0", "^99999999999999999999", "'x", ":float64", ":object", "#nan"]
TEXTS += ["@", "~", "float32", "float16", "int8", "bool", "complex128", "float8_e5m2", "x" * 3000]
TEXTS += ["fast", "small", "max", "floats", "exponents", "planes", "zstd", "raw", "huffman"]
TEXTS += ["affine", "codebook", "bitmask", "nofm", "trellis", "dense", "codes", "scale", "zero"]
OTHERS = [None, True, False, -1, -(2**63), 0.5, -0.0, 1e300, 1e-320, [], {}, [0], [[]], [4, 4]]
OTHERS += [[0, 2, 2], {"bits": 4}, {"": None}, [[[[[[[[[[[[]]]]]]]]]]]]]
_DEEP = "\x01deep"
_TWICE = "\x01"
_MOST = 2**16
"""Bytes above which a file is not extended any more."""


@dataclass(frozen=True)
class Mutant:
    """An altered file. how: what was done to it; base: as in `Seed`"""

    content: bytes
    seed: str
    how: str
    base: bytes | None = None


class Mutants:
    """Any number of mutants of some seeds; number k of a seed of the random numbers is always one.

    seed: of the random numbers, from 0
    """

    def __init__(self, seeds: list[Seed], seed: int = 0) -> None:
        self._seeds, self._seed = seeds, seed
        self._pieces = [Pieces.parse(given.content) for given in seeds]
        self._texts = [_json(pieces.header) for pieces in self._pieces]
        self._chunks = [chunk for pieces in self._pieces for chunk in pieces.chunks if chunk]

    def make(self, number: int) -> Mutant:
        """Mutant number `number`, the same whatever was made before."""
        choose = random.Random(self._seed << 40 | number)
        index = choose.randrange(len(self._seeds))
        given = self._seeds[index]
        if choose.random() < 0.1:
            return Mutant(self._damaged(given.content, choose), given.name, "damaged", given.base)
        if given.base is not None and choose.random() < 0.1:
            base = self._damaged(given.base, choose)
            return Mutant(given.content, given.name, "other base", base)
        pieces, how = self._copy(index), []
        for _ in range(choose.choice((1, 1, 1, 1, 2, 3))):
            change = choose.choices(_CHANGES, _WEIGHTS)[0]
            how.append(change.__name__.strip("_"))
            change(self, pieces, choose)
        return Mutant(pieces.content(), given.name, ", ".join(how), given.base)

    def _copy(self, index: int) -> Pieces:
        """The pieces of a seed, to change. Their text is not compressed, which takes long."""
        own = self._pieces[index]
        text = self._texts[index]
        return Pieces(
            json.loads(text),
            own.program,
            list(own.chunks),
            dict(own.preamble),
            text,
            text + own.program,
        )

    def _damaged(self, content: bytes, choose: random.Random) -> bytes:
        """Bytes changed, removed, put in or taken from another file; checksums as they were."""
        data = bytearray(content)
        for _ in range(choose.choice((1, 1, 2, 8))):
            _strike(data, choose, choose.choice(self._seeds).content)
        return bytes(data)

    def _header(self, pieces: Pieces, choose: random.Random) -> None:
        """Values of the header: others, none, or more of them."""
        for _ in range(choose.choice((1, 1, 1, 2, 4))):
            pieces.header = _altered(pieces.header, choose)
        _say(pieces, _json(pieces.header))
        if choose.random() < 0.5 and isinstance(pieces.header, dict):
            _settle(pieces)

    def _header_text(self, pieces: Pieces, choose: random.Random) -> None:
        """The header's bytes."""
        data = bytearray(pieces.header_text or b"")
        _strike(data, choose, choose.choice(self._texts))
        _say(pieces, bytes(data))

    def _program(self, pieces: Pieces, choose: random.Random) -> None:
        """Values of the stored program, or its bytes, or all of another's."""
        way = choose.random()
        if way < 0.05:
            pieces.program = choose.choice(self._pieces).program
        elif way < 0.25 or not pieces.program:
            data = bytearray(pieces.program)
            _strike(data, choose, choose.choice(self._pieces).program)
            pieces.program = bytes(data)
        else:
            try:
                value = json.loads(pieces.program)
            except (ValueError, RecursionError):
                return
            for _ in range(choose.choice((1, 1, 2, 4))):
                value = _altered(value, choose)
            pieces.program = _json(value)
        _say(pieces, pieces.header_text or b"")

    def _stream(self, pieces: Pieces, choose: random.Random) -> None:
        """The bytes of a chunk."""
        if not pieces.chunks:
            return
        index = choose.randrange(len(pieces.chunks))
        data = bytearray(pieces.chunks[index])
        for _ in range(choose.choice((1, 1, 2, 4))):
            _strike(data, choose, choose.choice(self._chunks))
        pieces.chunks[index] = bytes(data)
        _settle(pieces)

    def _chunks_moved(self, pieces: Pieces, choose: random.Random) -> None:
        """Chunks exchanged, doubled, removed, emptied, or from another file."""
        way, chunks = choose.randrange(6), pieces.chunks
        at = choose.randrange(len(chunks)) if chunks else 0
        if way == 0 or not chunks:
            chunks.insert(at, choose.choice(self._chunks))
        elif way == 1:
            del chunks[at]
        elif way == 2:
            chunks[at] = b""
        elif way == 3:
            chunks[at] = choose.choice(self._chunks)
        elif way == 4:
            chunks[at] = choose.randbytes(choose.randrange(100))
        else:
            choose.shuffle(chunks)
        _settle(pieces)

    def _preamble(self, pieces: Pieces, choose: random.Random) -> None:
        """Fields of the preamble."""
        right = PREAMBLE.unpack(pieces.content()[:40])[1:]
        names = ("version", "least", "required", "optional", "length")
        names += ("stored", "header", "program", "chunks")
        field = choose.randrange(len(names))
        most = 2 ** (16 if field < 4 else 64 if field == 4 else 32)
        near = right[field] + choose.choice((-1, 1, -8, 8, 56))
        value = choose.choice((near, near, choose.choice(EDGES), choose.choice(HUGE), most - 1))
        pieces.preamble[names[field]] = value % most

    def _frame(self, pieces: Pieces, choose: random.Random) -> None:
        """The text compressed, and mostly the bytes of that."""
        text = (pieces.header_text or b"") + pieces.program
        frame = bytearray(zstandard.ZstdCompressor(1, VOCABULARY).compress(text))
        if choose.random() < 0.9:
            _strike(frame, choose, choose.choice(self._seeds).content)
        pieces.squeezed = bytes(frame)

    def _digests(self, pieces: Pieces, choose: random.Random) -> None:
        """The table of checksums."""
        table = [choose.randbytes(8) for _ in range(choose.choice((0, 1, len(pieces.chunks), 50)))]
        pieces.digests = table


Change = Callable[[Mutants, Pieces, random.Random], None]
_CHANGES: list[Change]
_CHANGES = [Mutants._header, Mutants._stream, Mutants._program, Mutants._header_text]
_CHANGES += [Mutants._chunks_moved, Mutants._preamble, Mutants._frame, Mutants._digests]
_WEIGHTS = [36, 28, 16, 6, 5, 5, 2, 2]


def _json(value: Any) -> bytes:
    """Canonical JSON; marked keys become keys that occur twice, marked texts very deep lists."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if "\\u0001" in text:
        text = text.replace(json.dumps(_DEEP), "[" * 3000 + "]" * 3000)
        text = text.replace("\\u0001", "")
    return text.encode(errors="surrogatepass")


def _say(pieces: Pieces, header: bytes) -> None:
    pieces.header_text = header
    pieces.squeezed = header + pieces.program


def _settle(pieces: Pieces) -> None:
    """Makes the lengths in the table of runs those of the chunks, as far as it is still a table."""
    try:
        lengths = list(map(len, pieces.chunks))
        for run in pieces.header["runs"]:
            count = len(run[1])
            run[1], lengths = lengths[:count], lengths[count:]
    except (KeyError, IndexError, TypeError):
        return
    _say(pieces, _json(pieces.header))


def _altered(value: Any, choose: random.Random) -> Any:
    """The value with another one somewhere in it; containers are changed themselves."""
    above, at, below = None, None, value
    while isinstance(below, list | dict) and below and (above is None or choose.random() < 0.8):
        above = below
        at = choose.choice(list(above)) if isinstance(above, dict) else choose.randrange(len(above))
        below = above[at]
    if above is None:
        return _another(below, choose)
    way = choose.randrange(8)
    if way < 5:
        above[at] = _another(below, choose)
    elif way == 5:
        del above[at]
    elif isinstance(above, list):
        if way == 6:
            above[at:at] = [below] * choose.choice((1, 1, 2, 70))
        else:
            above[at], above[0] = above[0], above[at]
    elif way == 6:
        above[f"{at}{_TWICE}"] = _another(below, choose)
    else:
        above[choose.choice(TEXTS)] = above.pop(at)
    return value


def _another(value: Any, choose: random.Random) -> Any:
    """A value in place of one, mostly of its type."""
    way = choose.random()
    if type(value) is int and way < 0.75:
        if way < 0.4:
            return value + choose.choice((-2, -1, 1, 2, value, 8))
        return choose.choice(EDGES) if way < 0.7 else choose.choice(HUGE)
    if isinstance(value, str) and way < 0.7:
        return choose.choice(TEXTS) if way < 0.5 else value[choose.randrange(len(value) + 1) :]
    if way > 0.995:
        return _DEEP
    other = copy.deepcopy(choose.choice(OTHERS))  # A later change may put something into it.
    return choose.choice((other, choose.choice(TEXTS), choose.choice(EDGES)))


def _strike(data: bytearray, choose: random.Random, other: bytes) -> None:
    """Changes some bytes, in one of eight ways. other: where pieces are taken from"""
    at, way = choose.randrange(len(data) + 1), choose.randrange(8)
    if way == 0 or at == len(data):
        data[at:at] = choose.randbytes(choose.choice((1, 1, 2, 9)))
    elif way == 1:
        data[at] ^= 1 << choose.randrange(8)
    elif way == 2:
        data[at] = choose.randrange(256)
    elif way == 3:
        data[at] = choose.choice((0, 1, 127, 128, 255))
    elif way == 4:
        del data[at : at + choose.choice((1, 1, 2, 9))]
    elif way == 5:
        del data[at:]
    elif way == 6 and other:
        start = choose.randrange(len(other))
        piece = other[start : start + choose.choice((1, 4, 16, 64))]
        data[at : at + choose.choice((0, len(piece)))] = piece
    elif len(data) < _MOST:
        data[at:at] = data[at : at + choose.choice((1, 8, 100))]
