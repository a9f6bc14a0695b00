"""What an exporter gives back: the file, and what was found when it was checked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tersor.export.compared import Difference
from tersor.export.onnx_layers import Layer


@dataclass(frozen=True)
class Written:
    """A written file and what was found when it was checked.

    bytes: size of all its files together
    runtime: what it was checked with, None where it was not
    inputs: name -> sizes; a free size has a name, a fixed one is a number
    layers: what each weight became
    difference: from torch where all that is on no grid is computed in float32
    default_difference: from torch in a session with the runtime's default options
    grids: how many values are rounded to integers on a grid
    notes: what a user must not overlook, as sentences
    """

    path: Path
    bytes: int
    runtime: str | None
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    difference: Difference | None
    default_difference: Difference | None
    grids: int
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return plain
