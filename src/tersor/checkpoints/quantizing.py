"""Quantizes the tensors of a checkpoint as `quantize.entropy` does without data, block by block.

Only a sample of all weights decides on the step; then each block of rows is searched on its own,
and its codes go to a file, so that a checkpoint may be larger than memory.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import OutputError
from tersor.forms import Form, Trellis
from tersor.forms.form import rows
from tersor.methods.fitting import fit
from tersor.methods.survey import Weight, blind_step, plain_weight

Array = np.ndarray[Any, np.dtype[Any]]

STATES, THRIFT = 8, 0.2
"""As `quantize.entropy` has them by default."""
_BLOCK, _SAMPLE = 2**21, 2**22
_FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
_WIDTHS = (np.int8, np.int16, np.int32)
_MOST = 2**30
_NEAR, _FEW = 0.1, 16


TOO_LARGE = "holds weights too large to quantize and is kept"


@dataclass(frozen=True)
class Matrix:
    """A tensor that will be quantized. step: relative to those of the others; peak: largest |w|"""

    name: str
    tensor: Tensor
    axis: int
    step: float
    peak: float

    @property
    def rows(self) -> Tensor:
        """(outputs, inputs), where the elements lie."""
        return rows(self.tensor, self.axis)


def matrix_of(name: str, tensor: Tensor) -> tuple[Matrix | None, str]:
    """What to quantize of a tensor, or None and, where it is not obvious, the reason."""
    if tensor.dtype not in _FLOATS or tensor.dim() < 2 or not tensor.numel():
        return None, ""
    energy = peak = 0.0
    for piece in pieces(tensor):
        wide = piece.double()
        if not bool(wide.isfinite().all()):
            return None, f'"{name}" holds NaN or infinity and is kept as it is'
        energy += float(wide.square().sum())
        peak = max(peak, float(wide.abs().max()))
    # The search is in float32.
    if peak > torch.finfo(torch.float32).max:
        return None, f'"{name}" {TOO_LARGE}'
    axis = next((i for i, size in enumerate(tensor.shape) if size > 1), 0)
    step = blind_step(math.sqrt(energy / tensor.numel()), tensor.numel())
    return Matrix(name, tensor, axis, step, peak), ""


def too_large(matrices: Sequence[Matrix]) -> list[Matrix]:
    """Those whose codes would take more than 31 bits wherever most others have codes at all."""
    sizes = [matrix.peak / matrix.step for matrix in matrices if matrix.peak]
    middle = statistics.median_low(sizes) if sizes else 0.0
    return [matrix for matrix in matrices if matrix.peak / matrix.step > _MOST * middle]


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of a tensor in their order, a few millions at a time."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        yield flat[start : start + _BLOCK]


class Quantizer:
    """Knows the step for a number of bits, and quantizes one matrix after another by it."""

    def __init__(
        self, matrices: Sequence[Matrix], bits: float, folder: Path, steps: Mapping[str, float]
    ) -> None:
        """Fits the step.

        folder: for the codes; they take a byte for each weight, rarely two or four
        steps: of an earlier state, by name; one that is near enough is taken again, for equal
            weights then have equal codes
        """
        self._spill, self._steps = Spill(folder), steps
        self._fit = fit(list(_sample(matrices)), bits, STATES, THRIFT)

    @property
    def reached(self) -> float:
        """Bits that a weight of the sample takes."""
        return self._fit.reached

    def form(self, matrix: Matrix) -> Trellis | None:
        """What holds a matrix then; None where its largest weight takes more than 31 bits."""
        step = self._step(matrix)
        if not matrix.peak / step < _MOST:
            return None
        # The search takes codes a little beyond the nearest.
        most = matrix.peak / step / 2 + 4
        width = next(np.dtype(t) for t in _WIDTHS if most <= np.iinfo(t).max)
        found = (self._codes(matrix, block, step) for block in _blocks(matrix.rows))
        codes = self._spill.keep((block.astype(width) for block in found), width)
        return Trellis(
            torch.from_numpy(codes.reshape(matrix.rows.shape)),
            torch.full((1, 1), step, dtype=torch.float32),
            states=STATES,
            axis=matrix.axis,
            shape=tuple(matrix.tensor.shape),
            dtype=matrix.tensor.dtype,
        )

    def _step(self, matrix: Matrix) -> float:
        own = self._fit.step * matrix.step
        known = self._steps.get(matrix.name, math.inf)
        return known if abs(known / own - 1) < _NEAR else own

    def _codes(self, matrix: Matrix, block: Tensor, step: float) -> Array:
        weight = plain_weight(matrix.name, block)
        best = self._fit
        return weight.codes(step, states=STATES, bits=best.tables, rate=best.rate)[0]


class Spill:
    """Keeps arrays in a nameless file, and gives them back as parts of it."""

    def __init__(self, folder: Path) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as this
        except OSError as error:
            raise _no_room(folder, error) from error

    def keep(self, arrays: Iterable[Array], dtype: np.dtype[Any]) -> Array:
        """All elements of all arrays, flat."""
        start = self._file.seek(0, os.SEEK_END)
        try:
            # Written and not mapped for writing: a full disk would end the process.
            for array in arrays:
                self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()
        except OSError as error:
            raise _no_room(Path(self._file.name), error) from error
        count = (self._file.tell() - start) // dtype.itemsize
        return np.memmap(self._file, dtype, "c", offset=start, shape=(count,))


def decoded_pieces(item: Tensor | Form) -> Iterator[Tensor]:
    """The elements of a tensor, or of the weight that a form holds, a few millions at a time."""
    if not isinstance(item, Form):
        yield from pieces(item)
    elif isinstance(item, Trellis) and _rows_in_order(item):
        each = max(1, _BLOCK // item.codes.shape[1])
        for start in range(0, len(item.codes), each):
            codes = item.codes[start : start + each]
            step = item.step if len(item.step) == 1 else item.step[start : start + each]
            part = Trellis(
                codes, step, states=item.states, axis=0, shape=tuple(codes.shape), dtype=item.dtype
            )
            yield part.dense().reshape(-1)
    else:
        yield from pieces(item.dense().detach())


def _rows_in_order(form: Trellis) -> bool:
    axis = form.axis
    return axis is not None and form.codes.numel() > 0 and math.prod(form.shape[:axis]) == 1


def _no_room(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{folder} cannot take the codes while they are made: {error.strerror or error}; choose a "
        "folder that exists, is writable and has room"
    )


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Whole rows, about `_BLOCK` elements of them at a time."""
    each = max(1, _BLOCK // matrix.shape[1])
    for start in range(0, len(matrix), each):
        yield matrix[start : start + each]


def _sample(matrices: Sequence[Matrix]) -> Iterator[Weight]:
    """The same share of each matrix, so that no more than about `_SAMPLE` weights decide."""
    every = -(-sum(matrix.tensor.numel() for matrix in matrices) // _SAMPLE)
    for matrix in matrices:
        flat = matrix.rows
        # A column's mean magnitude, which tells what codes cost, needs several rows.
        count = min(len(flat), max(_FEW, len(flat) // every))
        columns = min(flat.shape[1], -(-flat.numel() // (every * count)))
        yield plain_weight(matrix.name, flat[:: len(flat) // count, :columns], matrix.step)
