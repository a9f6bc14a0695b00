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

PREAMBLE = struct.Struct("<8s4HQ4I")
MAGIC = b"\x89TERSOR\n"
VOCABULARY = zstandard.ZstdCompressionDict(
    (Path(__file__).parents[2] / "src" / "tersor" / "codec" / "vocabulary.txt").read_bytes(),
    dict_type=zstandard.DICT_TYPE_RAWCONTENT,
)


def digest(content: bytes, size: int = 8) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


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
    squeezed: bytes | None = None
    """The squeezed text, instead of what it should be."""
    digests: list[bytes] | None = None
    """The checksums of the chunks, instead of the right ones."""

    @classmethod
    def of(cls, path: Path) -> "Pieces":
        return cls.parse(path.read_bytes())

    @classmethod
    def parse(cls, content: bytes) -> "Pieces":
        magic, version, least, required, optional, length, *rest = PREAMBLE.unpack(content[:40])
        assert (magic, version, least, optional) == (MAGIC, 1, 1, 0)
        assert required in (0, 1)
        assert length == len(content)
        stored, header, program, count = rest
        start = 56 + stored + 8 * count
        assert content[40:56] == digest(content[:40] + content[56:start], 16)
        text = zstandard.ZstdDecompressor(VOCABULARY).decompress(content[56 : 56 + stored])
        assert len(text) == header + program
        fields = json.loads(text[:header])
        chunks = []
        for length in (n for run in fields.get("runs", []) for n in run[1]):
            chunks.append(content[start : start + length])
            at = 56 + stored + 8 * (len(chunks) - 1)
            assert digest(chunks[-1]) == content[at : at + 8]
            start += length
        assert start == len(content)
        assert len(chunks) == count
        return cls(fields, text[header:], chunks, {"required": required} if required else {})

    def copy(self) -> "Pieces":
        return deepcopy(self)

    def settle(self) -> "Pieces":
        """Corrects the lengths in the table of runs."""
        lengths = iter(map(len, self.chunks))
        for run in self.header["runs"]:
            run[1] = [next(lengths) for _ in run[1]]
        return self

    def write(self, path: Path) -> Path:
        """Writes the file with right checksums of whatever it holds."""
        path.write_bytes(self.content())
        return path

    def content(self) -> bytes:
        """The bytes of the file, with right checksums of whatever it holds."""
        text = self.header_text
        if text is None:
            text = json.dumps(
                self.header, sort_keys=True, separators=(",", ":"), ensure_ascii=False
            ).encode()
        squeezed = self.squeezed
        if squeezed is None:
            squeezed = zstandard.ZstdCompressor(19, VOCABULARY).compress(text + self.program)
        digests = self.digests if self.digests is not None else list(map(digest, self.chunks))
        section, body = squeezed + b"".join(digests), b"".join(self.chunks)
        fields = {"magic": MAGIC, "version": 1, "least": 1, "required": 0, "optional": 0}
        fields["length"] = 56 + len(section) + len(body)
        fields |= {"stored": len(squeezed), "header": len(text), "program": len(self.program)}
        fields["chunks"] = len(digests)
        start = PREAMBLE.pack(*(fields | self.preamble).values())
        return start + digest(start + section, 16) + section + body
