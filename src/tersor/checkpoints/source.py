"""Safetensors checkpoints: one file, or several with an index, read where they lie.

Tensors are parts of the mapped file: nothing is read before it is looked at, and what was read can
be forgotten again. Every header is checked by the safetensors library itself first.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor.errors import ModelError

TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Types of safetensors that a .tersor file holds as they are."""
NAMES = {dtype: kind for kind, dtype in TYPES.items()}
_STAND_INS = {"U16": torch.int16, "U32": torch.int32, "U64": torch.int64}
_INDEX = "*.safetensors.index.json"
_LARGEST_INDEX = 2**27


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a safetensors file.

    kind: its type in safetensors' words; shape: what the file says
    start, end: its bytes in the file
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass
class Shard:
    """One safetensors file. metadata: its __metadata__, in order; head: its header as it stands"""

    path: Path
    stored: list[Stored]
    metadata: dict[str, str]
    head: bytes
    _content: Any = field(repr=False)

    def tensor(self, stored: Stored) -> Tensor:
        """Its elements, those of a type that torch lacks as integers of the same width."""
        dtype = held_as(stored)
        raw = self._content[stored.start : stored.end]
        if dtype is torch.bool and raw.size and raw.max() > 1:
            dtype = torch.uint8
        if stored.start % dtype.itemsize:
            # Old writers did not align tensors, and torch cannot look at such as they lie.
            raw = np.array(raw)
        known = stored.kind in TYPES or stored.kind in _STAND_INS
        shape = stored.shape if known else (raw.size,)
        if not raw.size:
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    def forget(self) -> None:
        """Lets go of the pages that were read: while mapped they count as the program's memory.

        Tensors stay usable, and are read again.
        """
        self._content._mmap.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Checkpoint:
    """All files of a checkpoint. path: of the one, or of their index; index: what it holds"""

    path: Path
    shards: list[Shard]
    index: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[tuple[Shard, Stored]]:
        """Every tensor, file by file and as they lie there."""
        for shard in self.shards:
            for stored in shard.stored:
                yield shard, stored

    @property
    def file_bytes(self) -> int:
        """Of all its safetensors files."""
        return sum(shard.path.stat().st_size for shard in self.shards)


def held_as(stored: Stored) -> torch.dtype:
    """The type of the tensor that a .tersor file holds in its place; bytes for what is unknown."""
    return TYPES.get(stored.kind) or _STAND_INS.get(stored.kind, torch.uint8)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a .safetensors file, an index (.safetensors.index.json), or a folder with either.

    Raises ModelError for what is none, is damaged, or lacks files.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.suffix == ".json":
        return _indexed(path)
    shard = open_shard(path)
    if not shard.stored:
        raise ModelError(f"{path} holds no tensors, so there is nothing to pack")
    return Checkpoint(path, [shard])


def _in_folder(folder: Path) -> Path:
    """The one index or file in a folder."""
    for pattern in (_INDEX, "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ModelError(
                f"{folder} has {len(found)} of {pattern}, among them {found[0].name}; name one"
            )
        if found:
            return found[0]
    raise ModelError(f"the folder {folder} has no .safetensors file; name the checkpoint itself")


def _indexed(path: Path) -> Checkpoint:
    index = _json_of(path)
    placed = index.get("weight_map")
    placed = placed if isinstance(placed, dict) else {}
    names = placed.values()
    if not names or not all(isinstance(n, str) and n == Path(n).name and n for n in names):
        raise ModelError(
            f"{path} is no index of a checkpoint: its weight_map must name files in its folder"
        )
    shards = [open_shard(path.parent / name) for name in sorted(set(names))]
    where = [(stored.name, shard.path.name) for shard in shards for stored in shard.stored]
    if len(dict(where)) < len(where) or not placed.items() <= dict(where).items():
        raise ModelError(
            f"{path} and its {len(shards)} files do not belong together: they do not hold each "
            "tensor once, where the index says; download all of them again"
        )
    return Checkpoint(path, shards, index)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"it is longer than {_LARGEST_INDEX} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as an index: {_reason(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is no index of a checkpoint; name the .safetensors file")
    return found


def open_shard(path: Path) -> Shard:
    """One safetensors file. Raises ModelError for what is none."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        content = np.memmap(path, np.uint8, mode="c")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as a safetensors file: {_reason(error)}; give a checkpoint in "
            "that format"
        ) from error
    length = int.from_bytes(content[:8].tobytes(), "little")
    head = content[8 : 8 + length].tobytes()
    fields: dict[str, Any] = json.loads(head)
    metadata = fields.pop("__metadata__", None) or {}
    stored = [
        Stored(
            name,
            row["dtype"],
            tuple(row["shape"]),
            *(8 + length + offset for offset in row["data_offsets"]),
        )
        for name, row in fields.items()
    ]
    return Shard(path, sorted(stored, key=lambda s: (s.start, s.end)), metadata, head, content)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
