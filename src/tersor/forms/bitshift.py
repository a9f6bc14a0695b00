"""Bitshift form: every weight takes the same 1 to 4 bits, and stands for what many bits say.

A sequence of weights is a ring of bits. Each weight adds `bits` new ones, and the last `state_bits`
of them are its state, which a fixed formula turns into a value that looks drawn from N(0, 1). So
neighbours share most of their bits, and a search over all rings finds one that follows any sequence
closely: at 2 bits the mean squared error on N(0, 1) is 0.069 where separate levels reach 0.118 and
no code can go below 0.0625. Made for weights that are rotated first; see `Rotated`.

Source: Tseng et al. 2024 (QTIP), arXiv:2406.11235, section 3 and algorithm 1 (code 1MAD).
Differs: a sequence fills a tile of any shape, down its columns.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import OptionError
from tersor.forms.affine import from_matrix, matrix_shape
from tersor.forms.form import Form, Part, check_axis

LEAST_STATE_BITS, MOST_STATE_BITS = 8, 16


class Bitshift(Form):
    """weight[o, i] = values(state[o, i]) * scale[o]

    The weight as (outputs, inputs) is cut into tiles, one below the other and then the next column
    of tiles; those at the edges are filled up. A tile is a ring, read down its first column, then
    down the second: a weight's state is its own code in the lowest bits, above it the code before,
    and so on, `state_bits` in all.

    codes: (bytes,) uint8, all codes of `bits` bits, the first in the lowest bits of the first byte
    scale: (outputs, 1) bfloat16, or (1, 1) for all rows
    bits: 1 to 4
    state_bits: 8 to 16
    tile: (rows, columns), rows * columns * bits >= state_bits
    axis: the output channel of the weight; None for one row
    """

    kind = "bitshift"

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        *,
        bits: int,
        state_bits: int,
        tile: tuple[int, int],
        axis: int | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """Use `tersor.methods.viterbi` to find the codes of a weight, and `pack` for them."""
        super().__init__(shape, dtype)
        self.bits, self.state_bits, self.axis = bits, state_bits, axis
        self.tile = (int(tile[0]), int(tile[1]))
        self.register_buffer("codes", codes.contiguous())
        self.scale = nn.Parameter(scale.contiguous(), requires_grad=False)
        self.codes: Tensor

    def levels(self) -> Tensor:
        """(outputs, inputs) float32: the weight in units of its scale."""
        outputs, inputs = matrix_shape(self.shape, self.axis)
        down, across = tiles(outputs, inputs, self.tile)
        size = down * across, self.tile[0] * self.tile[1]
        codes = unpack(self.codes, self.bits, size[0] * size[1]).view(size)
        state = states(codes, self.bits, self.state_bits)
        return from_tiles(values(state), outputs, inputs, self.tile)

    def dense(self) -> Tensor:
        """The weight."""
        matrix = self.levels() * self.scale.float()
        return from_matrix(matrix, self.shape, self.axis).to(self.dtype)

    def parts(self) -> tuple[Part, ...]:
        """Packed codes and scales."""
        return (("codes", 8), ("scale", 16))

    def config(self) -> dict[str, Any]:
        """Bits, and layout."""
        return {
            "bits": self.bits,
            "state_bits": self.state_bits,
            "tile": list(self.tile),
            "axis": self.axis,
        }

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        bits, state_bits, axis = config["bits"], config["state_bits"], config["axis"]
        tile = config["tile"]
        check_layout(shape, bits=bits, state_bits=state_bits, tile=tile, axis=axis)
        codes, scale = parts["codes"], parts["scale"]
        outputs, inputs = matrix_shape(shape, axis)
        down, across = tiles(outputs, inputs, tile)
        count = -(-down * across * tile[0] * tile[1] * bits // 8)
        if codes.dtype != torch.uint8 or tuple(codes.shape) != (count,):
            raise ValueError(f"codes must be uint8 of shape {(count,)}")
        if scale.dtype != torch.bfloat16 or tuple(scale.shape) not in ((1, 1), (outputs, 1)):
            raise ValueError(f"scale must be bfloat16 of shape (1, 1) or {(outputs, 1)}")
        layout: dict[str, Any] = {"bits": bits, "state_bits": state_bits, "axis": axis}
        return cls(codes, scale, tile=(tile[0], tile[1]), shape=shape, dtype=dtype, **layout)


def check_layout(
    shape: tuple[int, ...], *, bits: int, state_bits: int, tile: Any, axis: int | None
) -> None:
    """Raises OptionError unless the options fit a weight of this shape."""
    if not _whole(bits, 1, 4):
        raise OptionError(f"bits={bits!r} for a weight of shape {shape}; choose 1 to 4")
    if not _whole(state_bits, LEAST_STATE_BITS, MOST_STATE_BITS):
        raise OptionError(
            f"state_bits={state_bits!r} for a weight of shape {shape}; choose "
            f"{LEAST_STATE_BITS} to {MOST_STATE_BITS}"
        )
    check_axis(shape, axis, none="one row")
    outputs, inputs = matrix_shape(shape, axis)
    # A tile must not be filled up beyond what a ring needs.
    limits = max(outputs, MOST_STATE_BITS), max(inputs, MOST_STATE_BITS)
    if (
        not isinstance(tile, list | tuple)
        or len(tile) != 2
        or not all(_whole(size, 1, most) for size, most in zip(tile, limits, strict=True))
        or tile[0] * tile[1] * bits < state_bits
    ):
        raise OptionError(
            f"tile={tile!r:.40} for a weight of {outputs} outputs and {inputs} inputs; choose at "
            f"most {limits} rows and columns, which hold {state_bits} bits or more together"
        )


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def tiles(outputs: int, inputs: int, tile: tuple[int, int]) -> tuple[int, int]:
    """How many tiles lie below one another and side by side."""
    return -(-outputs // tile[0]), -(-inputs // tile[1])


def to_tiles(matrix: Tensor, tile: tuple[int, int]) -> Tensor:
    """(outputs, inputs) -> (tiles, rows * columns), filled up with zeros."""
    outputs, inputs = matrix.shape
    down, across = tiles(outputs, inputs, tile)
    missing = (0, across * tile[1] - inputs, 0, down * tile[0] - outputs)
    cut = functional.pad(matrix, missing).view(down, tile[0], across, tile[1])
    return cut.permute(2, 0, 3, 1).reshape(across * down, -1)


def from_tiles(sequences: Tensor, outputs: int, inputs: int, tile: tuple[int, int]) -> Tensor:
    """The inverse of `to_tiles`."""
    down, across = tiles(outputs, inputs, tile)
    cut = sequences.view(across, down, tile[1], tile[0]).permute(1, 3, 0, 2)
    return cut.reshape(down * tile[0], across * tile[1])[:outputs, :inputs]


def states(codes: Tensor, bits: int, state_bits: int) -> Tensor:
    """The state of each code (rings, length), as int32."""
    found, known = codes.to(torch.int32), bits
    while known < state_bits:
        # Twice as many bits: those known of a code, below those of the codes before it.
        found = found + found.roll(known // bits, 1) * (1 << known)
        known *= 2
    return found & ((1 << state_bits) - 1)


def values(state: Tensor) -> Tensor:
    """What a state stands for, float32 (1MAD of QTIP, algorithm 1)."""
    # Modulo 2**32, which int32 does by itself.
    mixed = state.to(torch.int32) * 34038481 + 76625530
    total = (mixed & 255) - 510
    for byte in (1, 2, 3):
        total += torch.bitwise_right_shift(mixed, 8 * byte) & 255
    return total.float() / 147.800537


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits, flat, as bytes."""
    places = torch.arange(bits, device=codes.device)
    flags = ((codes.reshape(-1, 1).int() >> places) & 1).reshape(-1)
    flags = functional.pad(flags, (0, -len(flags) % 8)).view(-1, 8)
    return (flags << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`, int32."""
    step = bits if 8 % bits == 0 else 1
    places = torch.arange(0, 8, step, dtype=torch.int32, device=packed.device)
    spread = torch.bitwise_right_shift(packed.to(torch.int32)[:, None], places) & ((1 << step) - 1)
    if step == bits:
        return spread.reshape(-1)[:count]
    flags = spread.reshape(-1)[: count * bits].view(count, bits)
    found = flags[:, 0].clone()
    for bit in range(1, bits):
        found += flags[:, bit] * (1 << bit)
    return found
