"""Trellis form: whole numbers on a uniform grid, unbounded, with one step for all of a weight.

Made for entropy coding: small numbers are cheap, so nothing is gained by limiting their range. With
more than one state, two interleaved grids take turns along each row, and which one comes next
follows from the numbers before. A search for the best path through them gets most of what vector
quantization could give: up to 1.3 dB of the 1.53 dB that separate a uniform grid from the bound.

Source: Marcellin, Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov
sources", IEEE Trans. Communications 38(1); Kasner, Marcellin, Hunt 1999, "Universal trellis coded
quantization", IEEE Trans. Image Processing 8(12), for a grid that has 0 in both of its halves;
trellises from Ungerboeck 1982, IEEE Trans. Information Theory 28(1), table I.
Differs: the parity of a number chooses the branch, so the sign never does.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.forms.affine import as_matrix, from_matrix, matrix_shape
from tersor.forms.form import Form, Part, check_axis

TAPS = {
    1: (0, 0),
    4: (0b10, 0b01),
    8: (0b101, 0b010),
    16: (0b1001, 0b0010),
    32: (0b10010, 0b00100),
    64: (0b100001, 0b001010),
}
"""states -> what the lowest bit of a state, and an odd number, flip in the state shifted right."""

_WIDTHS = (torch.int8, torch.int16, torch.int32)


class Trellis(Form):
    """weight[o, i] = step[o] * point(codes[o, i], z[o, i])

    point is codes where `states` is 1. Otherwise it is 2 * codes where z is 0, and
    2 * codes - sign(codes) where z is 1. z is the lowest bit of the row's state, which starts at 0
    and becomes `following(state, code)` after each code.

    codes: (outputs, inputs) int8, int16 or int32, the narrowest that holds them
    step: (outputs, 1) float32, or (1, 1) for all rows, > 0
    states: 1, 4, 8, 16, 32 or 64
    axis: the output channel of the weight; None for one row
    """

    kind = "trellis"

    def __init__(
        self,
        codes: Tensor,
        step: Tensor,
        *,
        states: int,
        axis: int | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(shape, dtype)
        self.states, self.axis = states, axis
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("step", step.contiguous())
        self.codes: Tensor
        self.step: Tensor

    @classmethod
    def encode(
        cls, weight: Tensor, *, step: float | Tensor, states: int = 1, axis: int | None = 0
    ) -> Self:
        """The grid points nearest to `weight`, in squared error over each row.

        Error per weight at most step / 2 with one state; with more, grids of twice the step take
        turns: the mean squared error is 0.24 to 0.26 step**2 instead of 0.33, at the same rate.

        step: one for all, or (outputs,)
        """
        check_layout(tuple(weight.shape), states=states, axis=axis)
        matrix = as_matrix(weight.detach().float(), axis)
        steps = torch.as_tensor(step, dtype=torch.float32, device=matrix.device).reshape(-1, 1)
        if len(steps) not in (1, len(matrix)) or not bool((steps > 0).all()):
            raise OptionError(
                f"step={step!r:.60} for a weight of shape {tuple(weight.shape)}; give a number "
                f"> 0, or {len(matrix)} of them"
            )
        codes = (matrix / steps).round() if states == 1 else _nearest_path(matrix / steps, states)
        return cls(
            narrowest(codes),
            steps,
            states=states,
            axis=axis,
            shape=weight.shape,
            dtype=weight.dtype,
        )

    def points(self) -> Tensor:
        """(outputs, inputs) int32: the weight in units of its step."""
        return points_of(self.codes.to(torch.int32), self.states)

    def dense(self) -> Tensor:
        """The weight."""
        return from_matrix(self.points() * self.step, self.shape, self.axis).to(self.dtype)

    def parts(self) -> tuple[Part, ...]:
        """Codes and steps."""
        return (("codes", self.codes.element_size() * 8), ("step", 32))

    def config(self) -> dict[str, Any]:
        """Number of states, and layout."""
        return {"states": self.states, "axis": self.axis}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        states, axis = config["states"], config["axis"]
        check_layout(shape, states=states, axis=axis)
        codes, step = parts["codes"], parts["step"]
        wanted = matrix_shape(shape, axis)
        if tuple(codes.shape) != wanted or codes.dtype not in _WIDTHS:
            raise ValueError(f"codes must be whole numbers of shape {wanted}")
        if step.dtype != torch.float32 or tuple(step.shape) not in ((1, 1), (wanted[0], 1)):
            raise ValueError(f"step must be float32 of shape (1, 1) or {(wanted[0], 1)}")
        return cls(codes, step, states=states, axis=axis, shape=shape, dtype=dtype)


def check_layout(shape: tuple[int, ...], *, states: int, axis: int | None) -> None:
    """Raises OptionError unless the options fit a weight of this shape."""
    if states not in TAPS or isinstance(states, bool):
        raise OptionError(
            f"states={states!r} for a weight of shape {shape}; choose one of {list(TAPS)}"
        )
    check_axis(shape, axis, none="one row")


def following(state: int, odd: int, states: int) -> int:
    """The state after a code, of which `odd` is the lowest bit."""
    feedback, driven = TAPS[states]
    return (state >> 1) ^ (feedback if state & 1 else 0) ^ (driven if odd else 0)


def points_of(codes: Tensor, states: int) -> Tensor:
    """The points that rows of codes lead to, of the codes' type."""
    if states == 1:
        return codes
    return 2 * codes - quantizers(codes, states) * codes.sign()


def quantizers(codes: Tensor, states: int) -> Tensor:
    """Each z, 0 or 1, in the shape and type of the codes.

    A state is a linear function, modulo 2, of the parities before it. Its response to one odd code
    repeats, so two small matrices give z of whole rows at once.
    """
    rows, columns = codes.shape
    echo = _echo(states)
    period = len(echo)
    odd = (codes & 1).to(torch.float32)
    odd = torch.nn.functional.pad(odd, (0, -columns % period)).reshape(rows, -1, period)
    # Parity of the odd codes in all blocks before, at each place within the block.
    earlier = (odd.cumsum(1) - odd) % 2
    apart = torch.arange(period)[None, :] - torch.arange(period)[:, None]
    around = torch.tensor(echo, dtype=torch.float32)[(apart - 1) % period].to(codes.device)
    within = torch.where(apart.to(codes.device) > 0, around, 0)
    z = (earlier @ around + odd @ within) % 2
    return z.reshape(rows, -1)[:, :columns].to(codes.dtype)


@cache
def _echo(states: int) -> tuple[int, ...]:
    """Each z after one odd code, then 1, 2, ... even ones, until it repeats."""
    first = state = following(0, 1, states)
    found: list[int] = []
    while not found or state != first:
        found.append(state & 1)
        state = following(state, 0, states)
    return tuple(found)


def narrowest(codes: Tensor) -> Tensor:
    """The codes as the smallest integer type that holds them. Raises OptionError beyond 31 bits."""
    largest = float(codes.abs().max()) if codes.numel() else 0.0
    if not largest < 2**31 - 64:
        raise OptionError(
            f"a step gives codes up to {largest:.3g}, more than 31 bits; choose a larger step"
        )
    width = next(t for t in _WIDTHS if largest <= torch.iinfo(t).max)
    return codes.to(width)


def _nearest_path(levels: Tensor, states: int) -> Tensor:
    """Codes of the path with the least squared error for each row, by the Viterbi algorithm."""
    rows, columns = levels.shape
    state = torch.arange(states, device=levels.device)
    z, cost = (state & 1)[:, None], levels.new_full((states, rows), torch.inf)
    cost[0] = 0
    arrivals = [
        [(s, u) for s in range(states) for u in (0, 1) if following(s, u, states) == t]
        for t in range(states)
    ]
    source = torch.tensor([[s for s, _ in pair] for pair in arrivals], device=levels.device)
    parity = torch.tensor([[u for _, u in pair] for pair in arrivals], device=levels.device)
    chosen, codes = [], []
    for column in range(columns):
        level = levels[:, column]
        # (branch, state, row): the two ways into each state, and the code each of them takes.
        code = _nearest_of_parity(level, z[source.T].expand(-1, -1, 1), parity.T[..., None])
        point = 2 * code - z[source.T] * code.sign()
        total = cost[source.T] + (level - point) ** 2
        cost, branch = total.min(0)
        chosen.append(branch.to(torch.uint8))
        codes.append(code.gather(0, branch[None])[0].to(torch.int32))
    path, at = torch.empty_like(levels), cost.argmin(0)
    for column in reversed(range(columns)):
        path[:, column] = codes[column].gather(0, at[None])[0]
        branch = chosen[column].gather(0, at[None])[0].long()
        at = source[at, branch]
    return path


def _nearest_of_parity(level: Tensor, z: Tensor, parity: Tensor) -> Tensor:
    """The code of this parity whose point is nearest to `level`."""
    # Points of one parity: every fourth, on both sides of 0; shifted by z away from the even ones.
    size = level.abs()
    code = 2 * ((size + z - 2 * parity) / 4).round() + parity
    # The point of code 0 is 0 and not -z.
    code = torch.where((code < 0) | ((code == 2) & (2 * size < 4 - z)), parity, code)
    return code * torch.where(level < 0, -1, 1)
