"""The text of a file, squeezed with a vocabulary of what such texts are made of.

A header of few tensors is short, so that most of what it says is said for the first time. The
vocabulary has said it before. It is part of the format: a file can be read with no other.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import zstandard

from tersor.codec.pack import expand

_LEVEL = 19


def squeezed(text: bytes) -> bytes:
    """The text as one zstd frame, or as it is where that is no longer."""
    packed = zstandard.ZstdCompressor(level=_LEVEL, dict_data=_vocabulary()).compress(text)
    return packed if len(packed) < len(text) else text


def expanded(data: bytes, size: int) -> bytes:
    """The inverse. Raises Unreadable unless it gives `size` bytes."""
    return data if len(data) == size else expand(data, size, _vocabulary())


@cache
def _vocabulary() -> zstandard.ZstdCompressionDict:
    text = Path(__file__).with_name("vocabulary.txt").read_bytes()
    return zstandard.ZstdCompressionDict(text, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
