"""What a .tersor file says about itself: its tensors, its chunks, and how the model came about."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tersor.codec.container import Stored
from tersor.codec.pack import Coding
from tersor.program.program import DTYPE_NAMES
from tersor.version import VERSION


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor stored as it is, in a chunk that has its type."""

    shape: tuple[int, ...]
    chunk: int


@dataclass(frozen=True, slots=True)
class Formed:
    """A tensor stored as a form. parts: (name, tensor) in the order of the form's own"""

    form: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    config: dict[str, Any]
    parts: tuple[tuple[str, Plain | Formed], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter or buffer, under every name that it has in the model.

    layer: type of the layer that owns it under its first name, "Conv2d"
    """

    names: tuple[str, ...]
    layer: str
    tensor: Plain | Formed


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of elements of one coding. count: elements in it"""

    coding: Coding
    stored: Stored
    count: int


@dataclass(frozen=True)
class Header:
    """What `read_header` finds.

    writer: version of the tersor that wrote the file
    constants: name -> tensor that the stored program uses beside the weights
    recipe: the steps that were applied, as `Recipe.as_json` gives them
    program_bytes: length of the stored program, 0 for a file without one
    """

    writer: str
    entries: tuple[Entry, ...]
    constants: tuple[tuple[str, Plain], ...]
    chunks: tuple[Chunk, ...]
    recipe: list[dict[str, Any]]
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    program_bytes: int
    file_bytes: int

    def coding(self, tensor: Plain) -> Coding:
        """Type and bits of a plain tensor."""
        return self.chunks[tensor.chunk].coding

    def stored_bytes(self, entry: Entry) -> float:
        """Its share of the file's chunks, by number of elements where a chunk holds several."""
        found = 0.0
        for leaf in leaves(entry.tensor):
            chunk = self.chunks[leaf.chunk]
            found += chunk.stored.size * math.prod(leaf.shape) / max(1, chunk.count)
        return found


def leaves(tensor: Plain | Formed) -> Iterator[Plain]:
    """The plain tensors that `tensor` consists of, in the order they are stored."""
    if isinstance(tensor, Plain):
        yield tensor
    else:
        for _, part in tensor.parts:
            yield from leaves(part)


def as_json(
    entries: list[Entry], constants: list[tuple[str, Plain]], notes: dict[str, Any]
) -> dict[str, Any]:
    """The header without its table of chunks. notes: recipe, metrics and provenance"""
    return {
        "writer": VERSION,
        "tensors": [[list(e.names), e.layer, _tensor_json(e.tensor)] for e in entries],
        "constants": [[name, _tensor_json(tensor)] for name, tensor in constants],
        **notes,
    }


def coding_json(coding: Coding) -> list[Any]:
    """What the table of chunks says first about a chunk."""
    return [DTYPE_NAMES[coding.dtype], coding.bits]


def _tensor_json(tensor: Plain | Formed) -> Any:
    if isinstance(tensor, Plain):
        return [list(tensor.shape), tensor.chunk]
    return {
        "form": tensor.form,
        "shape": list(tensor.shape),
        "dtype": DTYPE_NAMES[tensor.dtype],
        "config": tensor.config,
        "parts": [[name, _tensor_json(part)] for name, part in tensor.parts],
    }
