"""Tensors as bytes: what a run of equal-natured elements looks like in a file.

Codes are packed as many to a byte as fit whole (two 3-bit codes, not 2.67), because zstd counts
bytes and whole codes keep their statistics. Wider elements are stored either as they lie in memory
or as byte planes (all first bytes, then all second bytes, ...), each a stream of its own: exponents
are very compressible and the lowest mantissa bytes not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from tersor.errors import ModelError
from tersor.forms import Form
from tersor.program.program import DTYPE_NAMES, DTYPES

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# zstd finds hardly any repeats among codes: what counts is when it starts a new Huffman table. The
# best block splitter with long matches does that as well as level 19, at ten times its speed;
# shorter matches win on sparse codes. The smaller of both is kept, for large data by a sample.
_SETTINGS = tuple(
    zstandard.ZstdCompressionParameters(
        window_log=20,
        hash_log=17,
        chain_log=17,
        search_log=search,
        min_match=match,
        target_length=999,
        strategy=strategy,
        write_content_size=True,
    )
    for strategy, match, search in (
        (zstandard.STRATEGY_BTULTRA2, 7, 2),
        (zstandard.STRATEGY_BTULTRA, 4, 1),
    )
)

# Data above the first size is judged by 64 small blocks from all over it, 1 MiB together.
_LARGE, _BLOCKS, _BLOCK = 2**22, 64, 2**14


class Unreadable(ValueError):
    """Bytes that no writer makes; the message is a sentence about them."""


@dataclass(frozen=True, slots=True)
class Coding:
    """What the elements of a chunk have in common.

    bits: of a code (int8, uint8 and bool), 1 to 8; all of an element for wider types
    """

    dtype: torch.dtype
    bits: int

    @property
    def per_byte(self) -> int:
        """Codes in a byte; 0 for types wider than a byte."""
        return 8 // self.bits if self.bits <= 8 and _narrow(self.dtype) else 0

    def packed_bytes(self, count: int) -> int:
        """Bytes of `count` elements before zstd."""
        if self.per_byte:
            return -(-count // self.per_byte)
        return count * self.dtype.itemsize


def coding_of(tensor: Tensor, bits: int = 8) -> Coding:
    """How `tensor` is coded when its elements need `bits`, which only narrow integers heed."""
    if tensor.dtype not in DTYPE_NAMES:
        raise ModelError(
            f"a tensor of shape {tuple(tensor.shape)} has type {tensor.dtype}, which a file cannot "
            f"hold; convert it to one of {sorted(DTYPES)}"
        )
    if tensor.dtype is torch.bool:
        bits = 1
    narrow = _narrow(tensor.dtype)
    return Coding(tensor.dtype, min(bits, 8) if narrow else tensor.dtype.itemsize * 8)


def encode(tensors: Sequence[Tensor], coding: Coding) -> list[bytes]:
    """The elements of `tensors`, one after another, as one stream or one per byte plane."""
    if coding.per_byte:
        return [_squeezed(_fields(_joined(_codes(t, coding.bits) for t in tensors), coding))]
    elements = _joined(_raw(t) for t in tensors).reshape(-1, coding.dtype.itemsize)
    if elements.size <= _LARGE:
        return min(_whole(elements), _planes(elements), key=_total)
    sample = _sample(elements, coding.dtype.itemsize)
    better = min(_whole, _planes, key=lambda split: _total(split(sample)))
    return better(elements)


def decode(streams: Sequence[bytes | memoryview], coding: Coding, count: int) -> Tensor:
    """The inverse of `encode`, flat. Raises Unreadable where lengths disagree."""
    size = coding.packed_bytes(count)
    width = 1 if coding.per_byte else coding.dtype.itemsize
    if len(streams) not in (1, width):
        raise Unreadable(f"has {len(streams)} streams where 1 or {width} are possible")
    parts = [_expanded(stream, size // len(streams)) for stream in streams]
    if coding.per_byte:
        return _unpacked(parts[0], coding, count)
    if len(parts) == 1:
        flat = parts[0].copy()
    else:
        flat = np.empty((count, width), np.uint8)
        for i, plane in enumerate(parts):
            flat[:, i] = plane
    return torch.from_numpy(flat.reshape(-1)).view(coding.dtype)


def coded_bytes(form: Form) -> int:
    """Bytes that the tensors of `form` take in a file when each is coded by itself.

    A tensor of more than 4 MiB is judged by a sample; on real weights that is within 1 %.
    """
    total = 0
    for name, bits in form.parts():
        inner = form._modules.get(f"{name}_form")
        if isinstance(inner, Form):
            total += coded_bytes(inner)
        else:
            tensor: Tensor = getattr(form, name)
            total += _coded_bytes(tensor, coding_of(tensor, bits))
    return total


def _coded_bytes(tensor: Tensor, coding: Coding) -> int:
    count = tensor.numel()
    if coding.packed_bytes(count) <= _LARGE:
        return _total(encode([tensor], coding))
    flat = tensor.detach().reshape(-1)
    each = _BLOCK * max(1, coding.per_byte) // coding.dtype.itemsize
    starts = _starts(count, each)
    sample = torch.cat([flat[start : start + each] for start in starts])
    return round(_total(encode([sample], coding)) * count / sample.numel())


def _narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.int8, torch.uint8, torch.bool)


def _raw(tensor: Tensor) -> Bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found: Bytes = flat.view(torch.uint8).numpy()
    return found


def _joined(arrays: Iterable[Bytes]) -> Bytes:
    found = list(arrays)
    return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, np.uint8)])


def _codes(tensor: Tensor, bits: int) -> Bytes:
    """Codes as whole numbers from 0; those of int8 start at -2**(bits - 1)."""
    codes = _raw(tensor)
    if tensor.dtype is torch.int8:
        codes = codes + np.uint8(2 ** (bits - 1))
    if bits < 8 and codes.size and int(codes.max()) >> bits:
        raise ModelError(
            f"a tensor of shape {tuple(tensor.shape)} holds codes that do not fit {bits} bits; "
            "encode the weight again"
        )
    return codes


def _fields(codes: Bytes, coding: Coding) -> Bytes:
    each = coding.per_byte
    if each == 1:
        return codes
    short = -codes.size % each
    if short:
        codes = np.concatenate([codes, np.zeros(short, np.uint8)])
    columns = codes.reshape(-1, each)
    packed = columns[:, 0].copy()
    for i in range(1, each):
        packed |= columns[:, i] << np.uint8(coding.bits * i)
    return packed


def _unpacked(packed: Bytes, coding: Coding, count: int) -> Tensor:
    bits, each = coding.bits, coding.per_byte
    if bits * each < 8 and packed.size and int(packed.max()) >> (bits * each):
        raise Unreadable(f"holds codes that do not fit {bits} bits")
    codes = np.empty((packed.size, each), np.uint8)
    for i in range(each):
        codes[:, i] = (packed >> np.uint8(bits * i)) & np.uint8(2**bits - 1)
    flat = codes.reshape(-1)
    if flat[count:].any():
        raise Unreadable("has codes after its last one")
    flat = flat[:count]
    if coding.dtype is torch.int8:
        flat -= np.uint8(2 ** (bits - 1))
    return torch.from_numpy(flat).view(coding.dtype)


def _whole(elements: Bytes) -> list[bytes]:
    return [_squeezed(elements)]


def _planes(elements: Bytes) -> list[bytes]:
    return [_squeezed(np.ascontiguousarray(elements[:, i])) for i in range(elements.shape[1])]


def _total(streams: Sequence[bytes]) -> int:
    return sum(map(len, streams))


def _squeezed(array: Bytes) -> bytes:
    """The bytes through zstd, or as they are where that is no smaller."""
    if array.size <= _LARGE:
        return min((coder(array) for coder in _CODERS), key=len)
    sample = _sample(array.reshape(-1, 1), 1)
    smallest = min(_CODERS, key=lambda coder: len(coder(sample)))
    return min(smallest(array), bytes(array), key=len)


def _with(settings: zstandard.ZstdCompressionParameters) -> Callable[[Bytes], bytes]:
    def compress(array: Bytes) -> bytes:
        return zstandard.ZstdCompressor(compression_params=settings).compress(array.data)

    return compress


_CODERS: tuple[Callable[[Bytes], bytes], ...] = (bytes, *map(_with, _SETTINGS))


def _sample(elements: Bytes, width: int) -> Bytes:
    """Blocks of (elements, width), evenly spaced."""
    each = _BLOCK // width
    starts = _starts(len(elements), each)
    return np.concatenate([elements[start : start + each] for start in starts])


def _starts(count: int, each: int) -> list[int]:
    return [i * (count - each) // (_BLOCKS - 1) for i in range(_BLOCKS)]


def _expanded(stream: bytes | memoryview, size: int) -> Bytes:
    if len(stream) == size:
        return np.frombuffer(stream, np.uint8)
    return np.frombuffer(expand(stream, size), np.uint8)


def expand(stream: bytes | memoryview, size: int) -> bytes:
    """Undoes zstd where the frame itself says that it holds `size` bytes."""
    try:
        stated = zstandard.frame_content_size(stream)
        if stated != size:
            raise Unreadable(f"holds {stated} bytes where its tensors need {size}")
        return zstandard.ZstdDecompressor().decompress(
            stream, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise Unreadable(f"cannot be decompressed ({error})") from None
