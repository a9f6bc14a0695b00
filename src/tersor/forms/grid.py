"""Grids: activations rounded to whole numbers of a scale, as an integer runtime has them.

A grid is no form: it stores no weight, but sits on a layer's input or output (`surgery/grids.py`)
and gives every value that passes the one that the runtime would compute with. The integers are
those of ONNX QuantizeLinear and DynamicQuantizeLinear: division, rounding half to even, clamping.

Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1; ONNX operator specification, opset 21.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError


class Rounding(nn.Module):
    """What may sit on a layer's input or output: `forward` gives x rounded, in its shape and dtype.

    Tensors are buffers or parameters and keep their own dtype: `model.half()` speaks of weights and
    activations, not of what a scale is stored as. A subclass with a trainable scale has a `freeze`
    that returns the `Grid` to deploy.
    """

    @property
    def kind(self) -> str:
        """What a file calls it."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class Grid(Rounding):
    """x -> (clamp(round(x / scale) + zero, low, high) - zero) * scale

    scale: () float32, > 0
    zero: () int32 in low..high, the integer that stands for 0.0
    bits: 2 to 8
    signed: integers -2**(bits-1) .. 2**(bits-1) - 1 instead of 0 .. 2**bits - 1

    Error of a value within the range at most scale / 2; values outside become its nearest end.
    Gradients pass straight through within the range and stop outside.
    """

    def __init__(self, scale: Tensor | float, zero: int, *, bits: int = 8, signed: bool) -> None:
        """Raises OptionError for what is no grid."""
        super().__init__()
        self.bits, self.signed = bits, signed
        if not isinstance(bits, int) or not 2 <= bits <= 8:
            raise OptionError(f"bits={bits!r} for activations; choose a whole number from 2 to 8")
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32).detach().clone())
        where = self.get_buffer("scale").device
        self.register_buffer("zero", torch.tensor(int(zero), dtype=torch.int32, device=where))
        self.scale: Tensor
        self.zero: Tensor
        if self.scale.shape or not 0 < float(self.scale) < math.inf:
            raise OptionError(
                f"scale={scale!r:.60} of a grid; it is one finite number above 0, the step between "
                "two levels"
            )
        if not self.low <= int(zero) <= self.high:
            raise OptionError(
                f"zero={zero} of a grid of {bits} bits; choose one of its integers "
                f"{self.low}..{self.high}, so that 0.0 is a level"
            )

    @classmethod
    def spanning(cls, low: float, high: float, *, bits: int = 8, signed: bool = False) -> Self:
        """The grid whose levels span low..high, widened to include 0, which stays exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        bottom = -(2 ** (bits - 1)) if signed else 0
        step = (high - low) / (2**bits - 1)
        # float32 knows nothing between its smallest normal number and 0 that division could bear.
        step = step if step >= torch.finfo(torch.float32).tiny else 1.0
        return cls(step, bottom + round(-low / step), bits=bits, signed=signed)

    @property
    def low(self) -> int:
        """The lowest integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The highest integer."""
        return self.low + (1 << self.bits) - 1

    @property
    def kind(self) -> str:
        """ "grid u8" for 0..255, "grid s4" for -8..7."""
        return f"grid {'s' if self.signed else 'u'}{self.bits}"

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest value that it can give."""
        zero, scale = int(self.zero), float(self.scale)
        return (self.low - zero) * scale, (self.high - zero) * scale

    def codes(self, x: Tensor) -> Tensor:
        """The integers that stand for `x`, int32 in its shape."""
        steps = torch.round(_wide(x) / self.scale)
        return (steps + self.zero).clamp(self.low, self.high).to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded."""
        # Clamped between low - zero and high - zero: adding zero and taking it off again is idle.
        steps = torch.clamp(_wide(x) / self.scale, self.low - self.zero, self.high - self.zero)
        return _like(x, _rounded(steps) * self.scale)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        low, high = self.range
        return f"{self.kind}, {low:.4g}..{high:.4g}"


class DynamicGrid(Rounding):
    """A grid whose scale is found anew for every tensor that passes.

    per tensor: 256 levels span min..max, 0 included, as ONNX DynamicQuantizeLinear has them. What
        one sample becomes depends on the others in its batch
    per row: 255 levels span -max|x| .. max|x| of each row of the last dimension

    levels: () float32, 255 or 127: how many steps the range, or half of it, is cut into
    """

    def __init__(self, *, per_row: bool = False) -> None:
        """per_row: one scale for each row of the last dimension instead of one per tensor."""
        super().__init__()
        self.per_row = per_row
        self.register_buffer("levels", torch.tensor(127.0 if per_row else 255.0))
        self.levels: Tensor

    @property
    def kind(self) -> str:
        """What a file calls it."""
        return "dynamic grid per row" if self.per_row else "dynamic grid"

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded."""
        wide = _wide(x)
        if self.per_row:
            scale = _or_one(wide.abs().amax(-1, keepdim=True) / self.levels)
            steps = torch.clamp(wide / scale, -self.levels, self.levels)
        else:
            low, high = wide.amin().clamp(max=0), wide.amax().clamp(min=0)
            scale = _or_one((high - low) / self.levels)
            zero = torch.round(torch.clamp(-low / scale, torch.zeros_like(low), self.levels))
            steps = torch.clamp(wide / scale, -zero, self.levels - zero)
        return _like(x, _rounded(steps) * scale)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return self.kind


def grid_from(kind: str, tensors: dict[str, Tensor]) -> Rounding:
    """The grid that a file calls `kind`, of these buffers. Raises ValueError where they misfit."""
    if not is_grid(kind):
        raise ValueError(f"{kind!r:.40} is no kind of grid")
    dynamic = kind.startswith("dynamic")
    wanted = {"levels": torch.float32} if dynamic else {"scale": torch.float32, "zero": torch.int32}
    if {name: (t.dtype, t.dim()) for name, t in tensors.items()} != {
        name: (dtype, 0) for name, dtype in wanted.items()
    }:
        raise ValueError(f"a {kind} has the buffers {sorted(wanted)}, one number each")
    if not dynamic:
        zero = int(tensors["zero"])
        return Grid(tensors["scale"], zero, bits=int(kind[-1]), signed=kind[-2] == "s")
    made = DynamicGrid(per_row=kind.endswith("row"))
    if not torch.equal(made.levels, tensors["levels"]):
        raise ValueError(f"a {kind} has {int(made.levels)} levels")
    return made


def is_grid(kind: str) -> bool:
    """Whether a file calls a grid so."""
    return kind in _KINDS


_KINDS = frozenset(
    {f"grid {sign}{bits}" for sign in "us" for bits in range(2, 9)}
    | {"dynamic grid", "dynamic grid per row"}
)


def _wide(x: Tensor) -> Tensor:
    """Half precision cannot divide by the smallest scales."""
    return x if x.dtype == torch.float32 else x.to(torch.float32)


def _like(x: Tensor, values: Tensor) -> Tensor:
    return values if values.dtype == x.dtype else values.to(x.dtype)


def _or_one(scale: Tensor) -> Tensor:
    """Zeros alone have no scale of their own."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _rounded(steps: Tensor) -> Tensor:
    """Rounded half to even, with the gradient of what was given; exactly the whole number."""
    whole = torch.round(steps)
    return whole.detach() + (steps - steps.detach()) if steps.requires_grad else whole
