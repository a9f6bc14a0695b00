"""Small pictures inside a page: a PNG made by hand and put into a data address."""

import base64
import struct
import zlib

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 pixels (height, width) or (height, width, 3) as a PNG."""
    height, width = pixels.shape[:2]
    grey = pixels.ndim == 2
    # Each row starts with its filter: 0, as it is.
    rows = np.zeros((height, 1 + width * (1 if grey else 3)), dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if grey else 2, 0, 0, 0)
    data = zlib.compress(rows.tobytes(), 9)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def address(encoded: bytes) -> str:
    """The PNG as a data: address."""
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


def picture(sample: np.ndarray, *, largest: int = 64) -> np.ndarray | None:
    """An input of a network as uint8 pixels, or None if it does not look like an image.

    sample: (1 or 3, height, width) or (height, width); floats are stretched to their own range,
        since the scale that a network was trained with is not known here
    largest: sides longer than this are thinned out
    """
    if sample.ndim == 3 and sample.shape[0] in (1, 3):
        sample = sample[0] if sample.shape[0] == 1 else sample.transpose(1, 2, 0)
    elif sample.ndim == 3 and sample.shape[2] == 1:
        sample = sample[:, :, 0]
    if sample.ndim not in (2, 3) or (sample.ndim == 3 and sample.shape[2] != 3):
        return None
    if min(sample.shape[:2]) < 4:
        return None
    step = -(-max(sample.shape[:2]) // largest)
    sample = sample[::step, ::step]
    if sample.dtype == np.uint8:
        return sample
    low, high = float(sample.min()), float(sample.max())
    if not np.isfinite([low, high]).all():
        return None
    stretched = (sample.astype(np.float64) - low) / max(high - low, 1e-12)
    return (255 * stretched).astype(np.uint8)
