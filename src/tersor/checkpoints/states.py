"""Hidden states between two blocks, (sequences, length, width) float32, on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from tersor.checkpoints.source import Shard, open_shard
from tersor.checkpoints.writing import Slot, writing

_NAME = "hidden"


def write_states(path: Path, shape: tuple[int, ...], batches: Iterator[Tensor]) -> None:
    """Writes the states of all sequences, batch by batch, whole or not at all."""
    count = 4
    for size in shape:
        count *= size
    with writing(path, [Slot(_NAME, "F32", shape, count)], {}) as writer:
        writer.put(_NAME, batches)
        writer.flush()


def read_states(path: Path) -> tuple[Tensor, Shard]:
    """The states where they lie, and the file."""
    shard = open_shard(path)
    return shard.tensor(shard.stored[0]), shard
