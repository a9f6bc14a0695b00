"""Takes .tersor files apart and writes altered ones whose checksums are right.

Written from docs/format.md alone, so it also holds the format to what that page says.
"""

import hashlib
import json
import struct
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

PREAMBLE = struct.Struct("<8sIIQQII")
MAGIC = b"\x89TERSOR\n"


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def aligned(position: int) -> int:
    return -(-position // 8) * 8


@dataclass
class Pieces:
    """A file's header as JSON values, its program as text, and the bytes of its chunks."""

    header: dict
    program: bytes
    chunks: list[bytes]
    preamble: dict = field(default_factory=dict)
    """Fields of the preamble to write instead of the right ones."""
    header_text: bytes | None = None
    """The header's text, instead of canonical JSON of `header`."""
    section: bytes | None = None
    """The compressed JSON, instead of what it should be."""

    @classmethod
    def of(cls, path: Path) -> "Pieces":
        content = path.read_bytes()
        magic, version, flags, length, stored, header, program = PREAMBLE.unpack(content[:40])
        assert (magic, version, flags, length) == (MAGIC, 0, 0, len(content))
        section = content[56 : 56 + stored]
        assert content[40:56] == digest(content[:40] + section)
        assert content[-32:] == hashlib.sha256(content[:-32]).digest()
        text = zstandard.decompress(section)
        assert len(text) == header + program
        fields = json.loads(text[:header])
        start = aligned(56 + stored)
        chunks = []
        for *_, offset, streams, checksum in fields["chunks"]:
            chunks.append(content[start + offset : start + offset + sum(streams)])
            assert digest(chunks[-1]).hex() == checksum
        return cls(fields, text[header:], chunks)

    def copy(self) -> "Pieces":
        return deepcopy(self)

    def settle(self) -> "Pieces":
        """Corrects the table of chunks: offsets, checksums, and lengths of single streams."""
        at = 0
        for row, chunk in zip(self.header["chunks"], self.chunks, strict=True):
            at = aligned(at)
            row[2], row[4] = at, digest(chunk).hex()
            if sum(row[3]) != len(chunk):
                row[3] = [len(chunk)]
            at += len(chunk)
        return self

    def write(self, path: Path) -> Path:
        """Writes the file with right checksums of whatever it holds."""
        text = self.header_text
        if text is None:
            text = json.dumps(
                self.header, sort_keys=True, separators=(",", ":"), ensure_ascii=False
            ).encode()
        section = self.section
        if section is None:
            section = zstandard.ZstdCompressor(level=19).compress(text + self.program)
        body = b""
        for chunk in self.chunks:
            body = body.ljust(aligned(len(body)), b"\0") + chunk
        padding = bytes(aligned(56 + len(section)) - 56 - len(section))
        fields = {"magic": MAGIC, "version": 0, "flags": 0}
        fields["length"] = 56 + len(section) + len(padding) + len(body) + 32
        fields |= {"stored": len(section), "header": len(text), "program": len(self.program)}
        start = PREAMBLE.pack(*(fields | self.preamble).values())
        content = start + digest(start + section) + section + padding + body
        path.write_bytes(content + hashlib.sha256(content).digest())
        return path
