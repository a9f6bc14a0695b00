"""How far a deployed file is from torch, on the example and on other sizes of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import ExportError, OptionError
from tersor.program.call import Call
from tersor.surgery.hold import decoded

TOLERANCE, GRID_TOLERANCE = 1e-4, 0.05


@dataclass(frozen=True)
class Difference:
    """The largest difference between outputs of the file and of torch.

    relative: to the largest value of that output
    steps: in 255ths of that output's range, the steps that 8 bits would have
    batches: sizes of the inputs that were compared
    """

    absolute: float
    relative: float
    steps: float
    batches: tuple[dict[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Trial:
    """Inputs to try a file on, and what torch gives for them.

    names: of the inputs
    """

    names: tuple[str, ...]
    batches: list[list[Tensor]]
    wanted: list[list[Any]]

    @classmethod
    def of(
        cls, reference: Call, tensors: list[Tensor], inputs: dict[str, tuple[int | str, ...]]
    ) -> Trial:
        """The example, and other sizes where `inputs` leaves them free."""
        batches = [tensors, *_other_sizes(reference, tensors, list(inputs.values()))]
        with decoded(reference.model):
            wanted = [reference(*[t.clone() for t in batch]) for batch in batches]
        return cls(tuple(inputs), batches, wanted)

    def feeds(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Each batch as arrays by name."""
        for batch in self.batches:
            yield {name: t.numpy() for name, t in zip(self.names, batch, strict=True)}

    def difference(self, found: list[list[np.ndarray[Any, Any]]]) -> Difference:
        """Compares the outputs that a file gives for the batches."""
        sizes = tuple(
            {name: tuple(t.shape) for name, t in zip(self.names, batch, strict=True)}
            for batch in self.batches
        )
        return _difference(self.wanted, found, sizes)

    @property
    def notes(self) -> list[str]:
        """What a user must know of the comparison."""
        alone = "outputs were compared on the example alone: no other size could be tried"
        return [alone] if len(self.batches) == 1 else []


def check_tolerance(tolerance: float | None) -> None:
    """Raises OptionError for what is no tolerance."""
    if tolerance is not None and not 0 < tolerance < 1:
        raise OptionError(f"tolerance={tolerance} is relative to the largest output; try 1e-4")


def tolerance_for(tolerance: float | None, grids: int) -> float:
    """The tolerance asked for, or what suits a file with so many grids."""
    return tolerance or (GRID_TOLERANCE if grids else TOLERANCE)


def require_close(found: Difference, tolerance: float) -> None:
    """Raises ExportError for a difference above `tolerance`."""
    if not found.relative <= tolerance:
        raise ExportError(
            f"outputs of the exported file differ from torch's by {found.relative:.3g} of the "
            f"largest output, more than tolerance={tolerance:g}; raise tolerance if that is "
            "acceptable"
        )


def _other_sizes(
    reference: Call, tensors: list[Tensor], sizes: list[tuple[int | str, ...]]
) -> list[list[Tensor]]:
    """One row more, and where lengths are free also a shorter one if the model accepts that."""
    larger = _resized(tensors, sizes, lambda name, size: size + (name == "batch"))
    shorter = _resized(larger, sizes, lambda name, size: size - (name != "batch") * (size // 3))
    found: list[list[Tensor]] = []
    for batch, before in ((larger, tensors), (shorter, larger)):
        if any(a.shape != b.shape for a, b in zip(batch, before, strict=True)):
            # The model alone knows which sizes it takes.
            with contextlib.suppress(Exception):
                reference(*[tensor.clone() for tensor in batch])
                found.append(batch)
    return found


def _resized(
    tensors: list[Tensor],
    sizes: list[tuple[int | str, ...]],
    change: Callable[[str, int], int],
) -> list[Tensor]:
    """The tensors with each dimension of a free size cut, or filled up with its first entries."""
    found = []
    for tensor, names in zip(tensors, sizes, strict=True):
        for dim, name in enumerate(names):
            if isinstance(name, str) and name.isidentifier() and tensor.shape[dim] > 0:
                size = tensor.shape[dim]
                tensor = tensor.index_select(dim, torch.arange(change(name, size)) % size)
        found.append(tensor)
    return found


def _difference(
    wanted: list[list[Any]],
    found: list[list[np.ndarray[Any, Any]]],
    sizes: tuple[dict[str, tuple[int, ...]], ...],
) -> Difference:
    absolute = relative = steps = 0.0
    for batch, outputs in zip(wanted, found, strict=True):
        for number, (value, output) in enumerate(zip(batch, outputs, strict=True)):
            true, seen = torch.as_tensor(value).double(), torch.from_numpy(output).double()
            if true.shape != seen.shape:
                raise ExportError(
                    f"output {number} of the exported file has shape {tuple(seen.shape)} where "
                    f"torch has {tuple(true.shape)}; report this with the model"
                )
            # Equal infinities, as in a mask, are no difference.
            gap = torch.where(true == seen, 0.0, (true - seen).abs()).nan_to_num(nan=math.inf)
            finite = true[true.isfinite()]
            largest = finite.abs().amax().item() if finite.numel() else 0.0
            span = (finite.amax() - finite.amin()).item() if finite.numel() else 0.0
            worst = gap.amax().item() if gap.numel() else 0.0
            absolute = max(absolute, worst)
            relative = max(relative, worst / largest if largest else worst)
            steps = max(steps, 255 * worst / span if span else 0.0)
    return Difference(absolute, relative, steps, sizes)
