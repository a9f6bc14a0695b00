"""What a .tersor file says about itself: its tensors, its chunks, and how the model came about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tersor.codec.coders import Shape
from tersor.program.program import DTYPE_NAMES, split_name
from tersor.version import VERSION

if TYPE_CHECKING:
    from tersor.codec.leaves import Leaf

SAME = "="
"""What a header says of a tensor that is the base's."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor stored as it is. kind: index into the header's kinds"""

    shape: tuple[int, ...]
    kind: int

    @property
    def count(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Formed:
    """A tensor stored as a form. parts: (name, tensor) by name"""

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
class Kind:
    """What tensors have in common.

    run: where their elements are; the bytes of the one value that all elements have; or None, if
        they are those of the base
    center: what was subtracted from their elements
    """

    dtype: torch.dtype
    run: int | bytes | None
    center: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks coded alike: one that holds several tensors, or parts of a single tensor.

    coder: of the codecs in `pack.CODERS`
    lengths: bytes of each chunk
    unit: rows in a chunk (columns where there is one row); None for all
    changed: whether elements are stored as changes from the base file's
    """

    coder: str
    lengths: tuple[int, ...]
    unit: int | None = None
    changed: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of the file.

    run: index; start: its first element in its run; offset: from the first chunk
    """

    run: int
    start: int
    shapes: tuple[Shape, ...]
    offset: int
    length: int
    digest: bytes

    @property
    def count(self) -> int:
        """Elements in it."""
        return sum(shape.size for shape in self.shapes)


@dataclass(frozen=True)
class Header:
    """What `read_header` finds.

    writer: version of the tersor that wrote the file
    constants: name -> tensor that the stored program uses beside the weights
    base: identity of the file that changes are counted from, empty where there is none
    recipe: the steps that were applied, as `Recipe.as_json` gives them
    structure: what was changed beside tensors, as `Structure.as_json` gives it
    identity: checksum of the header, which holds the checksums of all chunks
    program_bytes: length of the stored program, 0 for a file without one
    chunks_at: where the first chunk begins
    leaves: the plain tensors of entries and constants, in order
    inside: which of them lie in each run, in the order in which they are coded
    """

    writer: str
    entries: tuple[Entry, ...]
    constants: tuple[tuple[str, Plain], ...]
    kinds: tuple[Kind, ...]
    runs: tuple[Run, ...]
    chunks: tuple[Chunk, ...]
    leaves: tuple[Leaf, ...]
    inside: tuple[tuple[int, ...], ...]
    base: str
    recipe: list[dict[str, Any]]
    structure: dict[str, Any]
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    identity: str
    program_bytes: int
    chunks_at: int
    file_bytes: int

    def dtype(self, tensor: Plain) -> torch.dtype:
        """Type of a plain tensor."""
        return self.kinds[tensor.kind].dtype

    def changed(self, index: int) -> bool:
        """Whether a leaf is stored as changes from the base."""
        run = self.kinds[self.leaves[index].plain.kind].run
        return run is None or (isinstance(run, int) and self.runs[run].changed)

    def stored_bytes(self, entry: Entry) -> float:
        """Its share of the file's chunks, by number of elements where a chunk holds several."""
        wanted = {id(plain) for plain in leaves(entry.tensor)}
        found = 0.0
        for run, inside in zip(self.runs, self.inside, strict=True):
            sizes = [self.leaves[index].matrix.size for index in inside]
            own = [
                size
                for size, index in zip(sizes, inside, strict=True)
                if id(self.leaves[index].plain) in wanted
            ]
            found += sum(run.lengths) * sum(own) / sum(sizes)
        return found


def leaves(tensor: Plain | Formed) -> Iterator[Plain]:
    """The plain tensors that `tensor` consists of, in the order they are stored."""
    if isinstance(tensor, Plain):
        yield tensor
    else:
        for _, part in tensor.parts:
            yield from leaves(part)


def typed(
    entries: Sequence[Entry], constants: Sequence[tuple[str, Plain]], kinds: Sequence[int]
) -> tuple[list[Entry], list[tuple[str, Plain]]]:
    """The same tensors, each with its kind, which are given in the order of their leaves."""
    supply = iter(kinds)

    def of(tensor: Plain | Formed) -> Any:
        if isinstance(tensor, Plain):
            return replace(tensor, kind=next(supply))
        return replace(tensor, parts=tuple((name, of(part)) for name, part in tensor.parts))

    found = [replace(entry, tensor=of(entry.tensor)) for entry in entries]
    return found, [(name, of(plain)) for name, plain in constants]


def as_json(
    entries: Sequence[Entry],
    constants: Sequence[tuple[str, Plain]],
    kinds: Sequence[Kind],
    notes: dict[str, Any],
) -> dict[str, Any]:
    """The header without its table of runs; what is empty is left out.

    notes: recipe, structure, metrics, provenance and base
    """
    modules: dict[str, list[Any]] = {}
    tied: dict[str, str] = {}
    for entry in entries:
        path, leaf = split_name(entry.names[0])
        modules.setdefault(path, [path, entry.layer, {}])[2][leaf] = _tensor_json(entry.tensor)
        tied |= dict.fromkeys(entry.names[1:], entry.names[0])
    fields = {
        "writer": VERSION,
        "modules": list(modules.values()),
        "tied": tied,
        "constants": {name: _tensor_json(tensor) for name, tensor in constants},
        "kinds": [_kind_json(kind) for kind in kinds],
        **notes,
    }
    return {name: value for name, value in fields.items() if value or name == "modules"}


def run_json(run: Run) -> list[Any]:
    """[coder, lengths, unit, changed], without what is usual at the end."""
    row = [run.coder, list(run.lengths), run.unit or 0, int(run.changed)]
    return row if run.changed else row[:3] if run.unit else row[:2]


def _kind_json(kind: Kind) -> list[Any]:
    name = DTYPE_NAMES[kind.dtype]
    if kind.run is None:
        return [name, SAME]
    if isinstance(kind.run, bytes):
        return [name, kind.run.hex()]
    return [name, kind.run, kind.center] if kind.center else [name, kind.run]


def _tensor_json(tensor: Plain | Formed) -> list[Any]:
    """[kind, size, ...] or [form, shape, config, parts, dtype], float32 being understood."""
    if isinstance(tensor, Plain):
        return [tensor.kind, *tensor.shape]
    parts = {name: _tensor_json(part) for name, part in tensor.parts}
    row = [tensor.form, list(tensor.shape), tensor.config, parts]
    return row if tensor.dtype is torch.float32 else [*row, DTYPE_NAMES[tensor.dtype]]
