"""What a .tersor file notes of the safetensors files that were packed into it, to write them again.

    {"files": [{"name": ..., "metadata": [[key, value], ...], "order": [...]}, ...],
     "odd": {name: [name in the file, type, shape]}, "index": {"file": ..., "metadata": {...}}}

order: places, among the sorted names of all tensors, of those in a file, as they lie there; left
out where all lie in the usual order. odd: tensors that a .tersor file cannot name or type so
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from torch import Tensor

from tersor.checkpoints.source import NAMES, Checkpoint, Shard, Stored
from tersor.checkpoints.writing import Slot, head_of, slot_of, usual_order
from tersor.codec import Header, is_name
from tersor.codec.header import Formed
from tersor.errors import FileError, ModelError

KEY = "safetensors"
_LONGEST = 240
"""Bytes of a name; most disks take 255, some of which a draft of the file needs."""


@dataclass(frozen=True)
class Held:
    """A tensor of a checkpoint under the name that it has in the .tersor file."""

    shard: Shard
    stored: Stored

    def tensor(self) -> Tensor:
        """Its elements, where they lie."""
        return self.shard.tensor(self.stored)


@dataclass(frozen=True)
class Layout:
    """One safetensors file to write. names: of each slot in the .tersor file

    file: its name, None where the user names it
    """

    file: str | None
    slots: list[Slot]
    names: list[str]
    metadata: dict[str, str] = field(default_factory=dict)


def held_names(checkpoint: Checkpoint) -> dict[str, Held]:
    """Every tensor by the name that a .tersor file holds it under: its own where that can be."""
    found: dict[str, Held] = {}
    odd = []
    for shard, stored in checkpoint:
        if is_name(stored.name):
            found[stored.name] = Held(shard, stored)
        else:
            odd.append(Held(shard, stored))
    for held in odd:
        free = (f"tensor{n}" for n in range(len(found) + 1))
        found[next(name for name in free if name not in found)] = held
    return found


def notes_of(checkpoint: Checkpoint, held: Mapping[str, Held]) -> dict[str, Any]:
    """The notes on a checkpoint."""
    places = {id(held[name].stored): place for place, name in enumerate(sorted(held))}
    files = []
    for shard in checkpoint.shards:
        row: dict[str, Any] = {"metadata": [[key, value] for key, value in shard.metadata.items()]}
        slots = [slot_of(stored) for stored in shard.stored]
        if checkpoint.index is not None:
            row["name"] = shard.path.name
        if checkpoint.index is not None or slots != usual_order(slots):
            row["order"] = [places[id(stored)] for stored in shard.stored]
        files.append({key: value for key, value in row.items() if value})
    notes: dict[str, Any] = {
        "files": files,
        "odd": {
            name: [item.stored.name, item.stored.kind, list(item.stored.shape)]
            for name, item in held.items()
            if name != item.stored.name or NAMES.get(item.tensor().dtype) != item.stored.kind
        },
    }
    if checkpoint.index is not None:
        metadata = checkpoint.index.get("metadata", {})
        notes["index"] = {"file": checkpoint.path.name, "metadata": metadata}
    return {key: value for key, value in notes.items() if value}


def is_usual(checkpoint: Checkpoint) -> bool:
    """Whether unpacking writes the headers of its files again byte for byte."""
    return all(
        head_of([slot_of(stored) for stored in shard.stored], shard.metadata) == shard.head
        for shard in checkpoint.shards
    )


def layouts(header: Header) -> tuple[list[Layout], dict[str, Any]]:
    """The safetensors files that a .tersor file stands for, and their index: its file and metadata.

    One that was never a checkpoint stands for a single file, with a copy of each tied tensor.
    Raises FileError for notes that make no sense.
    """
    notes = header.provenance.get(KEY)
    slots = _slots(header)
    if notes is None:
        every = list(slots.values())
        return [_layout(None, usual_order(every), slots, {"format": "pt"})], {}
    try:
        return _noted(notes, slots)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"its notes on the safetensors files that it was made from make no sense ({error!r}); "
            "load its tensors with tersor.codec.stream"
        ) from None


def _noted(notes: Mapping[str, Any], slots: dict[str, Slot]) -> tuple[list[Layout], dict[str, Any]]:
    for name, (own, kind, shape) in notes.get("odd", {}).items():
        if not isinstance(own, str) or not isinstance(kind, str):
            raise TypeError(own, kind)
        slots[name] = Slot(own, kind, tuple(map(int, shape)), slots[name].size)
    names = sorted(slots)
    found = []
    for row in notes["files"]:
        inside = list(slots.values())
        if "order" in row:
            inside = [slots[names[_whole(place)]] for place in row["order"]]
        else:
            inside = usual_order(inside)
        metadata = {str(key): str(value) for key, value in row.get("metadata", [])}
        found.append(_layout(row.get("name"), inside, slots, metadata))
    everything = [name for layout in found for name in layout.names]
    if len(everything) != len(set(everything)) or set(everything) != set(slots):
        raise ValueError("they do not name each tensor once")
    if len(found) > 1 and len({layout.file for layout in found}) < len(found):
        raise ValueError("two files have one name")
    index = dict(notes.get("index", {}))
    if index and not _is_file(index["file"], ".safetensors.index.json"):
        raise ValueError(f"{index['file']!r:.60} is no name of an index")
    if index and "metadata" not in index:
        raise ValueError("the index has no metadata")
    if (len(found) != 1 and not index) or (index and any(f.file is None for f in found)):
        raise ValueError("several files have no index, or no names")
    return found, index


def _layout(
    file: Any, inside: list[Slot], slots: Mapping[str, Slot], metadata: dict[str, str]
) -> Layout:
    if file is not None and not _is_file(file):
        raise ValueError(f"{file!r:.60} is no name of a file")
    if len({slot.name for slot in inside}) < len(inside):
        raise ValueError("two tensors have one name")
    own = {id(slot): name for name, slot in slots.items()}
    return Layout(file, inside, [own[id(slot)] for slot in inside], metadata)


def _slots(header: Header) -> dict[str, Slot]:
    """A slot for each name in the file."""
    found = {}
    for entry in header.entries:
        tensor = entry.tensor
        dtype = tensor.dtype if isinstance(tensor, Formed) else header.dtype(tensor)
        kind = NAMES.get(dtype)
        if kind is None:
            raise ModelError(
                f'"{entry.names[0]}" of shape {tensor.shape} has the type {dtype}, which a '
                "safetensors file cannot hold; convert it and save the model again"
            )
        size = math.prod(tensor.shape) * dtype.itemsize
        for name in entry.names:
            found[name] = Slot(name, kind, tensor.shape, size)
    return found


def _is_file(name: Any, suffix: str = ".safetensors") -> bool:
    """Whether it names a file in whatever folder it is written to, and no other place."""
    plain = isinstance(name, str) and name.isprintable() and name == PurePath(name).name
    fits = plain and len(name.encode()) <= _LONGEST
    return fits and "\\" not in name and name.endswith(suffix)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no place")
    return value
