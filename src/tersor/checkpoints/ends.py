"""What lies outside of the blocks, embeddings and head, rounded to nearest some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tersor.checkpoints.parts import write_part
from tersor.checkpoints.writing import Writer
from tersor.forms import Affine

_SLICE = 2**22
"""Elements that are looked at together, about."""


def write_rounded(
    path: Path, name: str, weight: Tensor, *, bits: int, group_size: int | None
) -> None:
    """Writes a matrix (outputs, inputs) as the part that `Affine.encode` of all of it would be."""
    outputs, inputs = weight.shape
    groups = -(-inputs // (group_size or inputs))
    empty = Affine(
        torch.empty(outputs, inputs, dtype=torch.int8, device="meta"),
        torch.empty(outputs, groups, dtype=torch.bfloat16, device="meta"),
        None,
        bits=bits,
        group_size=group_size,
        axis=0,
        shape=(outputs, inputs),
        dtype=weight.dtype,
    )
    scales: list[Tensor] = []

    def codes() -> Iterator[Tensor]:
        each = max(1, _SLICE // inputs)
        for start in range(0, outputs, each):
            rows = weight[start : start + each].float()
            form = Affine.encode(rows, bits=bits, group_size=group_size)
            scales.append(form.scale.detach())
            yield form.codes

    def fill(writer: Writer) -> None:
        # As `parts` orders them: codes, then scales.
        writer.put("0", codes())
        writer.put("1", iter(scales))

    write_part(path, {name: empty}, {}, fill)


def decoded_rows(form: Affine, at: Tensor) -> Tensor:
    """Some rows of the weight, as float32."""
    zero = None if form.zero is None else form.zero[at]
    part = Affine(
        form.codes[at],
        form.scale.detach()[at],
        zero,
        **form.config(),
        shape=(len(at), form.shape[1]),
        dtype=torch.float32,
    )
    return part.dense()
