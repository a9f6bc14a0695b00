"""An update made small: the largest numbers, in a few levels, with what was lost kept for later.

A body is one byte for the bits (0: floats, without loss), a step for each trained tensor (float32,
little-endian, where there are bits), the codes as a part of `small` streams, and the statistics as
a part of floats. Trained tensors are changes; statistics are values, since the mean of values is a
value again, while a rounded change could leave a variance below zero. Shapes are not in it: both
ends know them.

Source: Sattler et al. 2019, arXiv:1903.02891, algorithm 1 and 2 (top-k, few levels and error
feedback both ways); Seide et al. 2014 for the feedback; Alistarh et al. 2017 (QSGD),
arXiv:1610.02132, section 3.1, for rounding that is right on average.
Differs from the papers: steps are fitted to least squares per tensor instead of being the mean or
the length, and codes go through tersor's adaptive coder instead of Golomb's or Elias'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersor.codec.coders import (
    Shape,
    decode_floats,
    decode_group,
    encode_floats,
    encode_group,
)
from tersor.codec.coders.static import part, parted
from tersor.errors import FileError, ModelError, OptionError
from tersor.federated.layout import Layout
from tersor.federated.options import check_count, check_number

_MOST_BITS = 8
_STARTS = tuple(2 ** (-i / 4) for i in range(12))
"""Of the largest number: where a fit of the step may begin."""
_ROUNDS = 3
_LARGEST = 2.0**96
"""No weight comes near it, and sums of thousands stay finite."""
Data = bytes | memoryview


@dataclass(frozen=True)
class Packing:
    """How updates are made small.

    bits: 2 to 8 for each number sent: codes from -(2**(bits - 1) - 1) to 2**(bits - 1) - 1
    keep: share of each tensor's numbers that is sent, the largest ones; above 0, at most 1
    feedback: what an update lost is added to the next. Without it rounding is drawn, so that it is
        right on average, and all numbers must be sent
    """

    bits: int = 4
    keep: float = 1.0
    feedback: bool = True

    def __post_init__(self) -> None:
        check_count("bits", self.bits, least=2, most=_MOST_BITS)
        check_number("keep", self.keep, most=1.0)
        if self.keep < 1 and not self.feedback:
            raise OptionError(
                f"keep={self.keep} with feedback=False would lose the other {1 - self.keep:.1%} of "
                "each update for good; use feedback=True, or keep=1"
            )

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2 ** (self.bits - 1)) - 1


class Packer:
    """One end's way of making its updates small. It remembers what they have lost."""

    def __init__(self, layout: Layout, packing: Packing | None, generator: torch.Generator) -> None:
        """packing: None sends floats without loss. generator: draws roundings without feedback."""
        self.layout = layout
        self.packing = packing
        self.generator = generator
        self.residual = [torch.zeros(shape) for shape in layout.shapes[: layout.trained]]
        self.before = self.residual

    def pack(self, change: Sequence[Tensor]) -> bytes:
        """A body of the change and what earlier ones have lost.

        change: as `Layout.shapes`: changes of trained tensors, values of statistics, float32.
        Raises ModelError where a number is not finite; nothing is remembered then.
        """
        for tensor in change:
            if not tensor.isfinite().all():
                raise ModelError(
                    f"an update holds a NaN or an infinity in a tensor of shape "
                    f"{tuple(tensor.shape)}; train with a lower rate"
                )
        trained, statistics = change[: self.layout.trained], change[self.layout.trained :]
        if self.packing is None:
            return b"\0" + part(_floats(trained)) + part(_floats(statistics))
        wanted = [c + r for c, r in zip(trained, self.residual, strict=True)]
        coded = [quantized(tensor, self.packing, self.generator) for tensor in wanted]
        self.before = self.residual
        self.residual = [
            tensor - restored(codes, step) if self.packing.feedback else torch.zeros_like(tensor)
            for tensor, (codes, step) in zip(wanted, coded, strict=True)
        ]
        return _body(self.packing.bits, coded, self.layout.matrices, statistics)

    def undo(self) -> None:
        """The last body was not counted: what it sent is lost, and what it owed is owed again."""
        self.residual = self.before


def quantized(wanted: Tensor, packing: Packing, generator: torch.Generator) -> tuple[Tensor, float]:
    """Codes (int32, of the tensor's shape) and their step."""
    flat = wanted.reshape(-1)
    codes = torch.zeros(flat.numel(), dtype=torch.int32)
    if not flat.numel():
        return codes.reshape(wanted.shape), 0.0
    kept = torch.arange(flat.numel())
    if packing.keep < 1:
        kept = flat.abs().topk(max(1, math.ceil(packing.keep * flat.numel()))).indices
    values = flat[kept]
    if packing.feedback:
        step = _fitted(values, packing.top)
        codes[kept] = _nearest(values, step, packing.top)
    else:
        step = _float32(float(values.abs().max()) / packing.top)
        codes[kept] = _drawn(values, step, packing.top, generator)
    return codes.reshape(wanted.shape), step


def restored(codes: Tensor, step: float) -> Tensor:
    """The numbers that codes stand for, float32: the same bits at both ends."""
    return codes.float() * step


def unpack(body: Data, layout: Layout) -> list[Tensor]:
    """The inverse of `Packer.pack`: changes of trained tensors, values of statistics.

    Raises FileError for bytes that no packer writes, whatever they are. Memory stays below 45 bytes
    a number of the layout and 8 MiB.
    """
    try:
        return _unpacked(memoryview(body), layout)
    except ValueError as error:
        raise FileError(f"the update {error}; have it sent again") from None


def longest_body(layout: Layout) -> int:
    """Bytes that no body exceeds. Codes of 8 bits and floats both stay below 5 bytes each."""
    return 1024 + 5 * layout.numbers + 4 * layout.trained


def _unpacked(body: Data, layout: Layout) -> list[Tensor]:
    if not 1 <= len(body) <= longest_body(layout):
        raise ValueError(f"has {len(body)} bytes where {longest_body(layout)} are the most")
    bits, rest = body[0], body[1:]
    trained = layout.shapes[: layout.trained]
    if bits == 0:
        first, rest = parted(rest)
        found = _from_floats(first, trained)
    elif 2 <= bits <= _MOST_BITS:
        if len(rest) < 4 * len(trained):
            raise ValueError("ends too early")
        steps = np.frombuffer(rest[: 4 * len(trained)], "<f4")
        if not np.isfinite(steps).all() or (steps < 0).any():
            raise ValueError("holds a step that is below zero or not finite")
        first, rest = parted(rest[4 * len(trained) :])
        found = _from_codes(first, steps.tolist(), bits, layout)
    else:
        raise ValueError(f"holds codes of {bits} bits, which no packer writes")
    last, rest = parted(rest)
    if len(rest):
        raise ValueError("goes on after its end")
    return found + _from_floats(last, layout.shapes[layout.trained :])


def _from_codes(data: Data, steps: Sequence[float], bits: int, layout: Layout) -> list[Tensor]:
    top = 2 ** (bits - 1) - 1
    matrices = decode_group(data, layout.matrices, profile="small", dtype=np.int8)
    found = []
    for matrix, shape, step in zip(matrices, layout.shapes, steps, strict=False):
        if matrix.size and not -top <= int(matrix.min()) <= int(matrix.max()) <= top:
            raise ValueError(f"holds codes beyond its {bits} bits")
        found.append(restored(torch.from_numpy(matrix).reshape(shape), step))
        _check_size(found[-1])
    return found


def _from_floats(data: Data, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    flat = torch.from_numpy(decode_floats(data, (1, sum(sizes)), kind="float32").view(np.float32))
    _check_size(flat)
    parts = torch.split(flat.reshape(-1), sizes)
    return [tensor.reshape(shape) for tensor, shape in zip(parts, shapes, strict=True)]


def _check_size(tensor: Tensor) -> None:
    # NaN fails every comparison.
    if tensor.numel() and not float(tensor.abs().max()) <= _LARGEST:
        raise ValueError(f"holds a number that is not finite, or beyond {_LARGEST:g}")


def _floats(tensors: Sequence[Tensor]) -> bytes:
    flat = [tensor.reshape(-1).numpy() for tensor in tensors]
    joined = np.concatenate([np.empty(0, np.float32), *flat]).view(np.uint32)
    return encode_floats(joined.reshape(1, -1), kind="float32")


def _body(
    bits: int,
    coded: Sequence[tuple[Tensor, float]],
    matrices: Sequence[Shape],
    statistics: Sequence[Tensor],
) -> bytes:
    steps = np.array([step for _, step in coded], "<f4").tobytes()
    stream = encode_group(
        [
            codes.numpy().reshape(shape.rows, shape.columns)
            for (codes, _), shape in zip(coded, matrices, strict=True)
        ],
        profile="small",
        kernels=[shape.kernel for shape in matrices],
    )
    return bytes([bits]) + steps + part(stream) + part(_floats(statistics))


def _fitted(values: Tensor, top: int) -> float:
    """The step with the least squared error among the starts, fitted to the codes it gives."""
    largest = float(values.abs().max())
    step = min(
        (_float32(share * largest / top) for share in _STARTS),
        key=lambda step: float((values - restored(_nearest(values, step, top), step)).norm()),
    )
    for _ in range(_ROUNDS):
        codes = _nearest(values, step, top).float()
        square = float(codes.square().sum())
        step = _float32(float(codes @ values) / square) if square else step
    return step


def _nearest(values: Tensor, step: float, top: int) -> Tensor:
    if step == 0:
        return torch.zeros(values.shape, dtype=torch.int32)
    return (values / step).round().clamp(-top, top).int()


def _drawn(values: Tensor, step: float, top: int, generator: torch.Generator) -> Tensor:
    """Up or down by chance, so that the mean of many draws is the value."""
    if step == 0:
        return torch.zeros(values.shape, dtype=torch.int32)
    drawn = torch.rand(values.shape, generator=generator)
    return (values / step + drawn).floor().clamp(-top, top).int()


def _float32(value: float) -> float:
    """As a message holds it; 0 for what is too small for a normal float."""
    rounded = float(np.float32(value))
    return rounded if rounded >= float(np.finfo(np.float32).tiny) else 0.0
