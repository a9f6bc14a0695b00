"""Makes one .tersor file of a checkpoint and of the parts that were quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.checkpoints.job import Job
from tersor.checkpoints.layout import KEY, Held, notes_of
from tersor.checkpoints.parts import Item, read_part
from tersor.checkpoints.source import Checkpoint, Shard
from tersor.codec import save_tensors, stream
from tersor.errors import OutputError
from tersor.forms import Form


def assemble(
    job: Job,
    checkpoint: Checkpoint,
    held: Mapping[str, Held],
    ends: int,
    out: Path,
    recipe: Sequence[Mapping[str, Any]],
    profile: str,
) -> int:
    """Writes the file, read again and compared before it takes its name; counts its codes.

    ends: how many parts there are of weights outside of the blocks
    """
    items: dict[str, Item] = {name: item.tensor() for name, item in held.items()}
    shards: dict[str, Shard] = {name: item.shard for name, item in held.items()}
    quantized = 0
    paths = [job.end(at) for at in range(ends)]
    paths += [job.part(at) for at in range(len(job.blocks))]
    for part in map(read_part, paths):
        for name, item in part.items.items():
            own = job.weights.names[name]
            if isinstance(item, Form):
                # The type that the checkpoint has, so that unpacking gives it back.
                item.dtype = held[own].tensor().dtype
                quantized += held[own].tensor().numel()
            items[own], shards[own] = item, part.shard

    def forget(name: str) -> None:
        shards[name].forget()

    def compare(draft: Path) -> None:
        # As an open file: by its path it would be mapped, and count as memory once it was read.
        with draft.open("rb") as file:
            for entry, found in stream(file):
                name = entry.names[0]
                if not _same(found, items[name]):
                    raise OutputError(
                        f'"{name}" did not come back from the file as it was written, so nothing '
                        "was kept; look after the disk and the memory, and call it again"
                    )
                forget(name)

    save_tensors(
        items,
        out,
        recipe=recipe,
        provenance={KEY: notes_of(checkpoint, held)},
        profile=profile,
        check=compare,
        coded=forget,
    )
    return quantized


def _same(found: Item, meant: Item) -> bool:
    """Whether two items hold the same bits."""
    if isinstance(found, Tensor) and isinstance(meant, Tensor):
        flat = [t.detach().reshape(-1).view(torch.uint8) for t in (found, meant)]
        return found.dtype == meant.dtype and torch.equal(*flat)
    if not (isinstance(found, Form) and isinstance(meant, Form)):
        return False
    parts = [
        [form._modules.get(f"{name}_form") or getattr(form, name) for name, _ in form.parts()]
        for form in (found, meant)
    ]
    described = (found.kind, found.config(), found.shape) == (
        meant.kind,
        meant.config(),
        meant.shape,
    )
    return described and all(_same(*pair) for pair in zip(*parts, strict=True))
