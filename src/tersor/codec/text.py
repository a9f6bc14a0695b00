"""The text of a file, squeezed."""

from __future__ import annotations

import zstandard

from tersor.codec.pack import expand


def squeezed(text: bytes) -> bytes:
    """The text in fewer bytes."""
    return zstandard.ZstdCompressor(level=19).compress(text)


def expanded(data: bytes, size: int) -> bytes:
    """The inverse. Raises Unreadable unless it gives `size` bytes."""
    return expand(data, size)
