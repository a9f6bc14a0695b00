"""Writes safetensors files tensor by tensor, in any order, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor.checkpoints.source import Stored
from tersor.errors import OutputError
from tersor.files import atomic

_RANKS = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL"),
)


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor to write. kind, shape: as in `Stored`; size: its bytes"""

    name: str
    kind: str
    shape: tuple[int, ...]
    size: int


class Writer:
    """An open safetensors file, all of whose tensors have their place already."""

    def __init__(self, file: BinaryIO, slots: Sequence[Slot], head: bytes) -> None:
        self._file, self._at = file, {}
        offset = 8 + len(head)
        file.write(len(head).to_bytes(8, "little") + head)
        for slot in slots:
            self._at[slot.name] = offset
            offset += slot.size
        file.truncate(offset)
        file.flush()

    def flush(self) -> None:
        """Writes what waits in memory. Raises OSError where the disk has no room for it."""
        self._file.flush()

    def put(self, name: str, pieces: Iterator[Tensor]) -> None:
        """Writes a tensor, given in pieces that follow each other."""
        self._file.seek(self._at[name])
        for piece in pieces:
            flat = piece.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                self._file.write(flat.view(torch.uint8).numpy().data)


@contextmanager
def writing(path: Path, slots: Sequence[Slot], metadata: Mapping[str, str]) -> Iterator[Writer]:
    """A file with room for `slots`, in this order; it becomes `path` when the block ends well.

    Its header is checked before the block, so that of several files none has its name by then.
    """
    with atomic(path) as draft, draft.open("r+b") as file:
        writer = Writer(file, slots, head_of(slots, metadata))
        try:
            with safe_open(draft, framework="numpy"):
                pass
        except SafetensorError as error:
            raise OutputError(
                f"{path} would be no safetensors file: {error}; nothing was written"
            ) from error
        yield writer


def head_of(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    """The header, written as the safetensors library does."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for slot in slots:
        fields[slot.name] = {
            "dtype": slot.kind,
            "shape": list(slot.shape),
            "data_offsets": [offset, offset + slot.size],
        }
        offset += slot.size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def slot_of(stored: Stored) -> Slot:
    """The place that a tensor has in its file."""
    return Slot(stored.name, stored.kind, stored.shape, stored.end - stored.start)


def usual_order(slots: Sequence[Slot]) -> list[Slot]:
    """As the safetensors library lays tensors out: by type, the widest first, then by name."""
    ranks = {kind: rank for rank, kind in enumerate(_RANKS)}
    return sorted(slots, key=lambda slot: (ranks.get(slot.kind, len(ranks)), slot.name))
