"""A model's tensors and forms, taken out of it for a file and rebuilt from one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch
from torch import Tensor, nn

from tersor.codec.container import Text, read_chunks
from tersor.codec.header import Entry, Formed, Header, Plain, leaves
from tersor.codec.pack import Coding, Unreadable, coding_of, decode, encode
from tersor.errors import CompressError, ModelError
from tersor.forms import KINDS, Form
from tersor.surgery.hold import hold
from tersor.surgery.walk import kind_of

LARGE = 2**20
"""Bytes from which a tensor gets a chunk of its own; smaller ones share chunks up to this size."""


class Shelf:
    """Sorts tensors into chunks of equal coding, in the order they are put."""

    def __init__(self) -> None:
        self._chunks: list[tuple[Coding, list[Tensor]]] = []
        self._open: dict[Coding, tuple[int, int]] = {}

    def put(self, tensor: Tensor, bits: int = 8) -> Plain:
        """Gives `tensor` a place. bits: that a code of it needs"""
        coding = coding_of(tensor, bits)
        size = tensor.numel() * tensor.element_size()
        index, filled = self._open.get(coding, (-1, 0))
        if index < 0 or filled + size > LARGE:
            index, filled = len(self._chunks), 0
            self._chunks.append((coding, []))
        # A large tensor closes its chunk and leaves the one that small tensors share open.
        if size <= LARGE:
            self._open[coding] = (index, filled + size)
        self._chunks[index][1].append(tensor)
        return Plain(tuple(tensor.shape), index)

    def chunks(self) -> Iterator[tuple[Coding, list[bytes]]]:
        """Each chunk's coding and streams, encoded when asked for."""
        for coding, tensors in self._chunks:
            yield coding, encode(tensors, coding)


def collect(model: nn.Module, shelf: Shelf) -> list[Entry]:
    """Puts every parameter, persistent buffer and form of `model` on the shelf, tied ones once."""
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[str, Tensor | Form]] = {}
    for name, layer, item in stored(model):
        names.setdefault(id(item), []).append(name)
        first.setdefault(id(item), (kind_of(layer), item))
    if not names:
        raise ModelError(f"{type(model).__name__} has no parameters or buffers, so nothing to save")
    return [
        Entry(tuple(names[key]), kind, _described(item, names[key][0], shelf))
        for key, (kind, item) in first.items()
    ]


def stored(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, Tensor | Form]]:
    """(name, layer, item) of each parameter, form and persistent buffer, under all its names."""
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise ModelError(
            f'"{path}" ({type(module).__name__}) keeps extra state that is no tensor, which a file '
            "cannot hold; make it a buffer"
        )
    prefix = f"{path}." if path else ""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, module, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, module, buffer
    for name, child in module._modules.items():
        if isinstance(child, Form):
            yield prefix + name.removesuffix("_form"), module, child
        elif child is not None:
            yield from stored(child, prefix + name)


def _described(item: Tensor | Form, name: str, shelf: Shelf, bits: int = 8) -> Plain | Formed:
    if isinstance(item, Tensor):
        check_storable(item, name)
        return shelf.put(item, bits)
    if item.training_only:
        raise ModelError(
            f'"{name}" is held by a {type(item).__name__} of shape {item.shape}, which exists for '
            "training only; freeze() it first and hold what that returns"
        )
    if not isinstance(item, KINDS.get(item.kind, ())):
        raise ModelError(
            f'"{name}" is held by a {type(item).__name__} of shape {item.shape}, which is none of '
            f"the forms a file knows {sorted(KINDS)}; add it to forms.KINDS"
        )
    parts = []
    for part, part_bits in item.parts():
        inner = item._modules.get(f"{part}_form")
        value = inner if isinstance(inner, Form) else getattr(item, part)
        parts.append((part, _described(value, f"{name}, {part}", shelf, part_bits)))
    return Formed(item.kind, item.shape, item.dtype, item.config(), tuple(parts))


def check_storable(tensor: Tensor, name: str) -> None:
    """Raises ModelError for a tensor without data, and for weights that are NaN or infinite."""
    if tensor.is_meta:
        raise ModelError(
            f'"{name}" is on the meta device and has no values; load the weights first'
        )
    if tensor.is_floating_point() and tensor.numel():
        wide = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        # Masks of minus infinity are ordinary buffers; NaN never is.
        parameter = isinstance(tensor, nn.Parameter)
        bad = ~torch.isfinite(wide) if parameter else torch.isnan(wide)
        if bool(bad.any()):
            what = "NaN or infinite" if parameter else "NaN"
            raise ModelError(
                f'"{name}" of shape {tuple(tensor.shape)} holds {int(bad.sum())} values that are '
                f"{what}; load a checkpoint that trained cleanly"
            )


def read_tensors(file: IO[bytes], text: Text, header: Header) -> list[Tensor]:
    """Every plain tensor, in the order of `all_leaves`; the whole file has been checked then."""
    order = all_leaves(header)
    inside: list[list[int]] = [[] for _ in header.chunks]
    for index, leaf in enumerate(order):
        inside[leaf.chunk].append(index)
    found: list[Tensor] = [torch.empty(0)] * len(order)
    chunks = read_chunks(file, text, [chunk.stored for chunk in header.chunks])
    # read_chunks comes first: it checks the end of the file after its last chunk.
    for number, streams in enumerate(chunks):
        chunk, indices = header.chunks[number], inside[number]
        try:
            flat = decode(streams, chunk.coding, chunk.count)
        except Unreadable as error:
            raise Unreadable(f"chunk {number} {error}") from None
        sizes = [math.prod(order[i].shape) for i in indices]
        for index, piece in zip(indices, torch.split(flat, sizes), strict=True):
            own = piece if len(indices) == 1 else piece.clone()
            found[index] = own.reshape(order[index].shape)
    return found


def all_leaves(header: Header) -> list[Plain]:
    """The plain tensors of a file: those of the entries, then the constants."""
    found = [leaf for entry in header.entries for leaf in leaves(entry.tensor)]
    return found + [plain for _, plain in header.constants]


def rebuild(header: Header, tensors: list[Tensor]) -> tuple[list[Tensor | Form], dict[str, Tensor]]:
    """What each entry describes, and the constants by name."""
    supply = iter(tensors)
    items: list[Tensor | Form] = []
    for entry in header.entries:
        try:
            items.append(_rebuilt(entry.tensor, header, supply))
        except _MISFITS as error:
            raise Unreadable(f'"{entry.names[0]}" cannot be rebuilt: {error}') from None
    return items, {name: next(supply) for name, _ in header.constants}


# What forms raise for parts and options that do not belong together.
_MISFITS: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(RuntimeError, OverflowError, ZeroDivisionError, CompressError),
)


def _rebuilt(tensor: Plain | Formed, header: Header, supply: Iterator[Tensor]) -> Tensor | Form:
    if isinstance(tensor, Plain):
        return next(supply)
    parts = {name: _rebuilt(part, header, supply) for name, part in tensor.parts}
    plain = {name: part.dense() if isinstance(part, Form) else part for name, part in parts.items()}
    form = KINDS[tensor.form].build(dict(tensor.config), plain, tensor.shape, tensor.dtype)
    _check_faithful(form, tensor, header)
    for name, part in parts.items():
        if isinstance(part, Form):
            hold(form, name, part)
    return form


def _check_faithful(form: Form, stored: Formed, header: Header) -> None:
    """A form must describe itself as the file does, or what is loaded is not what was saved."""
    config: Mapping[str, Any] = form.config()
    if config != stored.config or form.shape != stored.shape or form.dtype != stored.dtype:
        raise ValueError(f"its options {stored.config} are not those of a {stored.form} form")
    own = dict(form.parts())
    if list(own) != [name for name, _ in stored.parts]:
        raise ValueError(f"its parts must be {list(own)}")
    for name, part in stored.parts:
        if isinstance(part, Plain):
            coding = header.coding(part)
            if coding != coding_of(getattr(form, name), own[name]):
                raise ValueError(f'its part "{name}" is coded at {coding.bits} bits')
