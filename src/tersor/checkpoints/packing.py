"""Packs a safetensors checkpoint into one .tersor file, without the code of its network."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tersor.checkpoints.layout import KEY, Held, held_names, is_usual, notes_of
from tersor.checkpoints.quantizing import (
    TOO_LARGE,
    Matrix,
    Quantizer,
    decoded_pieces,
    matrix_of,
    pieces,
    too_large,
)
from tersor.checkpoints.source import open_checkpoint
from tersor.codec import (
    Header,
    check_apart,
    check_profile,
    read_header,
    read_parts,
    save_tensors,
    stream,
)
from tersor.errors import ModelError, OptionError, OutputError
from tersor.forms import Form, Trellis
from tersor.methods.fitting import missed

MOST_BITS = 16


class Progress(Protocol):
    """What is told how far the work is: `tersor.progress.Bar`, for example."""

    def plan(self, units: int) -> None:
        """How many units there are."""

    def doing(self, what: str) -> None:
        """What is done now."""

    def advance(self, units: int = 1) -> None:
        """Units that are done."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of the file. type: in the checkpoint; stored: as what; error: relative, of all"""

    name: str
    shape: tuple[int, ...]
    type: str
    stored: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Packed:
    """What `pack` did.

    bytes_before, bytes_after: of the checkpoint's files, and of the file
    elements: in all tensors
    error: root of the squared errors of all quantized weights, relative to their own; 0 for none
    identical: whether unpacking gives the same files byte for byte
    """

    path: Path
    bytes_before: int
    bytes_after: int
    elements: int
    error: float
    identical: bool
    seconds: float
    tensors: list[PackedTensor]
    notes: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Of the file, everything in it counted; 0 where no tensor has elements."""
        return 8 * self.bytes_after / self.elements if self.elements else 0.0

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        found = asdict(self) | {"path": str(self.path)}
        return found | {"bits_per_weight": self.bits_per_weight}


def pack(
    path: str | Path,
    out: str | Path,
    *,
    bits: float | None = None,
    profile: str = "small",
    base: str | Path | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Writes a checkpoint as one .tersor file, read again and compared before it takes its name.

    Tensors are read where they lie, and written one after another: memory for a few millions of
    elements is enough, and for the largest tensor. `unpack` writes the checkpoint again;
    `tersor.load(out, into=network)` puts it into a network.

    path: a .safetensors file, the index of several, or their folder
    out: the file to write
    bits: that a weight of two or more dimensions takes on average, above 0 and up to 16; None
        keeps every tensor bit for bit
    profile: "fast" to load, "small", or "max" for the smallest file; all hold the same numbers
    base: a packed file of an earlier state, of which only the changes are stored; it stays needed

    Raises ModelError for what is no checkpoint, OptionError for options out of range, OutputError
    where the file cannot be written.
    """
    started = time.monotonic()
    out = Path(out)
    check_profile(profile)
    _check_bits(bits)
    checkpoint = open_checkpoint(path)
    sources = [checkpoint.path, *(shard.path for shard in checkpoint.shards), base]
    check_apart(out, sources, f"out={out} is what the file is made from")
    held = held_names(checkpoint)
    told = progress or Silent()
    steps = {} if base is None or bits is None else _steps(base)
    items, notes = _items(held, bits, out.parent, steps, told)
    errors: dict[str, _Error] = {}

    def compare(draft: Path) -> None:
        told.doing("comparing the file")
        for name, item in _read_again(draft, base):
            errors[name] = _compared(name, item, items[name], held[name])
            told.advance(held[name].stored.end - held[name].stored.start)

    told.doing("writing the file")
    note = notes_of(checkpoint, held)
    save_tensors(items, out, provenance={KEY: note}, profile=profile, base=base, check=compare)
    tensors = _described(read_header(out), held, errors)
    return Packed(
        path=out,
        bytes_before=checkpoint.file_bytes,
        bytes_after=out.stat().st_size,
        elements=sum(math.prod(tensor.shape) for tensor in tensors),
        error=_relative([error for error in errors.values() if error.quantized]),
        identical=is_usual(checkpoint) and not any(e.quantized for e in errors.values()),
        seconds=time.monotonic() - started,
        tensors=tensors,
        notes=notes,
    )


def free_name(path: str | Path) -> Path:
    """The name beside a checkpoint that its packed file has if none is given.

    Raises OptionError where there is such a file already, which nobody asked to replace.
    """
    # Links are not followed: caches keep checkpoints as links to files of other names elsewhere.
    path = Path(os.path.abspath(path))
    stem = path.name.removesuffix(".index.json").removesuffix(".safetensors")
    found = path.parent / f"{path.name if path.is_dir() else stem}.tersor"
    if found.exists():
        raise OptionError(f"{found} is there already; name the file to write to replace it")
    return found


def _steps(base: str | Path) -> dict[str, float]:
    """Of each tensor that has one in the base."""
    found = read_parts(base, "step")
    return {name: float(step) for name, step in found.items() if step.numel() == 1}


def _items(
    held: Mapping[str, Held],
    bits: float | None,
    folder: Path,
    steps: Mapping[str, float],
    told: Progress,
) -> tuple[dict[str, Tensor | Form], list[str]]:
    """What to store for each name, and what must be said of it."""
    items: dict[str, Tensor | Form] = {name: item.tensor() for name, item in held.items()}
    sizes = {name: item.stored.end - item.stored.start for name, item in held.items()}
    told.plan(sum(sizes.values()) * (1 if bits is None else 3))
    if bits is None:
        return items, []
    told.doing("looking at the weights")
    matrices: list[Matrix] = []
    notes: list[str] = []
    for name in held:
        matrix, reason = matrix_of(name, held[name].tensor())
        matrices += [] if matrix is None else [matrix]
        notes += [reason] if reason else []
        told.advance(sizes[name])
    # One step for all would leave no bits to the others.
    for matrix in too_large(matrices):
        matrices.remove(matrix)
        notes.append(f'"{matrix.name}" {TOO_LARGE}')
    if not matrices:
        raise ModelError(
            f"bits={bits:g} quantizes float tensors of two or more dimensions, and the checkpoint "
            "has none that can be; pack it without loss"
        )
    told.doing("quantizing")
    told.advance(sum(sizes.values()) - sum(sizes[matrix.name] for matrix in matrices))
    quantizer = Quantizer(matrices, bits, folder, steps)
    if missed(quantizer.reached, bits):
        notes.append(
            f"bits={bits:g} were asked for, and the quantized weights take about "
            f"{quantizer.reached:.3g}; no step that was tried comes nearer"
        )
    for matrix in matrices:
        form = quantizer.form(matrix)
        if form is None:
            notes.append(f'"{matrix.name}" {TOO_LARGE}')
        else:
            items[matrix.name] = form
        told.advance(sizes[matrix.name])
    return items, notes


@dataclass(frozen=True)
class _Error:
    """Of one tensor: sums of the squared errors, and of the squared values."""

    quantized: bool = False
    of_errors: float = 0.0
    of_values: float = 0.0


def _read_again(draft: Path, base: str | Path | None) -> Iterator[tuple[str, Tensor | Form]]:
    for entry, item in stream(draft, base=base):
        yield entry.names[0], item


def _compared(name: str, found: Tensor | Form, meant: Tensor | Form, held: Held) -> _Error:
    """Its error. Raises OutputError unless the file holds exactly what it was given."""
    if isinstance(meant, Trellis) and isinstance(found, Trellis):
        same = torch.equal(found.codes, meant.codes) and torch.equal(found.step, meant.step)
    else:
        same = isinstance(found, Tensor) and isinstance(meant, Tensor) and _equal(found, meant)
    if not same:
        raise OutputError(
            f'"{name}" did not come back from the file as it was written, so nothing was kept; '
            "if the checkpoint did not change meanwhile, look after the disk and the memory"
        )
    if not isinstance(found, Form):
        return _Error()
    of_errors = of_values = 0.0
    original, start = held.tensor().reshape(-1), 0
    for piece in decoded_pieces(found):
        true = original[start : start + piece.numel()].double()
        of_errors += float((piece.double() - true).square().sum())
        of_values += float(true.square().sum())
        start += piece.numel()
    return _Error(True, of_errors, of_values)


def _equal(found: Tensor, meant: Tensor) -> bool:
    """Bit for bit: NaN is itself, and -0 is not 0."""
    if (found.dtype, found.shape) != (meant.dtype, meant.shape):
        return False
    pairs = zip(pieces(found), pieces(meant), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _relative(errors: Sequence[_Error]) -> float:
    """Root of the squared errors, relative to the values."""
    of_values = sum(error.of_values for error in errors)
    return math.sqrt(sum(error.of_errors for error in errors) / of_values) if of_values else 0.0


def _described(
    header: Header, held: Mapping[str, Held], errors: Mapping[str, _Error]
) -> list[PackedTensor]:
    return [
        PackedTensor(
            name=held[entry.names[0]].stored.name,
            shape=held[entry.names[0]].stored.shape,
            type=held[entry.names[0]].stored.kind,
            stored="quantized" if errors[entry.names[0]].quantized else "as it is",
            bytes=round(header.stored_bytes(entry)),
            error=_relative([errors[entry.names[0]]]),
        )
        for entry in header.entries
    ]


def _check_bits(bits: float | None) -> None:
    number = isinstance(bits, Real) and not isinstance(bits, bool)
    if bits is not None and not (number and 0 < bits <= MOST_BITS):
        shown = f"{bits:g}" if number else f"{bits!r:.40}"
        raise OptionError(
            f"bits={shown} for each weight; give a number above 0 and up to {MOST_BITS}, or none "
            "to keep every tensor bit for bit"
        )


class Silent:
    """Tells nobody."""

    def plan(self, units: int) -> None:
        """Ignored."""

    def doing(self, what: str) -> None:
        """Ignored."""

    def advance(self, units: int = 1) -> None:
        """Ignored."""
