"""Forms in a file that is read where it lies: what is known of a block once it is quantized.

A file of safetensors: the tensors of all forms under their numbers, and in its metadata what else
describes the forms, and notes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.checkpoints.source import NAMES, TYPES, Shard, open_shard
from tersor.checkpoints.writing import Slot, Writer, writing
from tersor.errors import FileError
from tersor.forms import KINDS, Form
from tersor.surgery.hold import hold

Item = Tensor | Form


@dataclass(frozen=True)
class Part:
    """Forms and tensors by name, and notes of plain JSON values. shard: the file they lie in"""

    items: dict[str, Item]
    notes: dict[str, Any]
    shard: Shard


def write_part(
    path: Path,
    items: Mapping[str, Item],
    notes: Mapping[str, Any],
    fill: Callable[[Writer], None] | None = None,
) -> None:
    """Writes a part, whole or not at all.

    fill: writes the tensors, where those of `items` are on the meta device
    """
    tensors: list[Tensor] = []
    rows = {name: _described(item, tensors) for name, item in items.items()}
    slots = [
        Slot(str(at), NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        for at, tensor in enumerate(tensors)
    ]
    with writing(path, slots, {"items": json.dumps(rows), "notes": json.dumps(notes)}) as writer:
        if fill is not None:
            fill(writer)
        else:
            for at, tensor in enumerate(tensors):
                writer.put(str(at), iter([tensor]))
        writer.flush()


def read_part(path: Path) -> Part:
    """The inverse; nothing is read before it is looked at. Raises FileError for another file."""
    shard = open_shard(path)
    tensors = {stored.name: shard.tensor(stored) for stored in shard.stored}
    try:
        rows = json.loads(shard.metadata["items"])
        items = {name: _rebuilt(row, tensors) for name, row in rows.items()}
        return Part(items, dict(json.loads(shard.metadata["notes"])), shard)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"{path} is not what was written there ({error!r:.80}); remove the work folder and "
            "start again"
        ) from error


def _described(item: Item, tensors: list[Tensor]) -> Any:
    """The number of a tensor, or [form, config, shape, type, parts]."""
    if isinstance(item, Tensor):
        tensors.append(item)
        return len(tensors) - 1
    parts = {}
    for name, _ in item.parts():
        inner = item._modules.get(f"{name}_form")
        value = inner if isinstance(inner, Form) else getattr(item, name)
        parts[name] = _described(value.detach() if isinstance(value, Tensor) else value, tensors)
    return [item.kind, item.config(), list(item.shape), NAMES[item.dtype], parts]


def _rebuilt(row: Any, tensors: Mapping[str, Tensor]) -> Item:
    if isinstance(row, int):
        return tensors[str(row)]
    kind, config, shape, dtype, described = row
    parts = {name: _rebuilt(part, tensors) for name, part in described.items()}
    plain = {name: part.dense() if isinstance(part, Form) else part for name, part in parts.items()}
    form = KINDS[kind].build(config, plain, tuple(shape), TYPES[dtype])
    for name, part in parts.items():
        if isinstance(part, Form):
            hold(form, name, part)
    return form
