"""Reads the tables of a header: kinds, runs and the chunks that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tersor.codec.coders import Shape
from tersor.codec.container import Text
from tersor.codec.errors import expect, whole
from tersor.codec.exponents import MOST_EXPONENTS
from tersor.codec.geometry import as_coded, pieces
from tersor.codec.header import SAME, Chunk, Kind, Run
from tersor.codec.leaves import Leaf, arranged
from tersor.codec.pack import CODERS, INTEGERS, MOST_CODE, word_coders
from tersor.program.program import DTYPES

LARGEST_CHUNK = 2**24
"""Most elements in a chunk: a decoder may take 40 bytes for each while it works."""


def kind_of(number: int, row: Any) -> Kind:
    """A row of the kinds: [type, run, center], [type, value in hex] or [type, "="]."""
    what = f"kind {number}"
    expect(isinstance(row, list) and len(row) in (2, 3), f"{what} is no list of 2 or 3")
    name, run, center = (*row, 0)[:3]
    expect(isinstance(name, str) and name in DTYPES, f"{what} is of the type {name!r:.40}")
    dtype = DTYPES[name]
    if run == SAME and len(row) == 2:
        return Kind(dtype, None)
    if isinstance(run, str):
        fits = len(run) in (0, 2 * dtype.itemsize) and len(row) == 2
        expect(fits and set(run) <= set("0123456789abcdef"), f"{what} has no value")
        expect(dtype is not torch.bool or run in ("", "00", "01"), f"{what} has no value")
        return Kind(dtype, bytes.fromhex(run))
    expect(whole(run), f"{what} lies in no run")
    centered = len(row) == 2 or (type(center) is int and 0 < abs(center) <= MOST_CODE)
    expect(centered, f"{what} has the center {center!r:.40}")
    return Kind(dtype, run, center)


def run_of(number: int, row: Any) -> Run:
    """A row of the runs: [coder, lengths, unit, changed], without what is usual at the end."""
    what = f"run {number}"
    expect(isinstance(row, list) and len(row) in (2, 3, 4), f"{what} is no list of 2 to 4")
    coder, lengths, unit, changed = (*row, 0, 0)[:4]
    fits = isinstance(lengths, list) and lengths != [] and all(map(whole, lengths))
    expect(isinstance(coder, str), f"{what} is coded by {coder!r:.40}")
    expect(fits, f"{what} has no lengths")
    expect(whole(unit) and bool(unit) == (len(lengths) > 1), f"{what} has chunks of {unit!r:.40}")
    expect(changed in (0, 1) and type(changed) is int, f"{what} has {changed!r:.40} changes")
    usual = [coder, lengths, unit, changed][: 4 if changed else 3 if unit else 2]
    expect(row == usual, f"{what} states what is understood")
    return Run(coder, tuple(lengths), unit or None, bool(changed))


def contents_of(
    kinds: Sequence[Kind], runs: Sequence[Run], leaves: Sequence[Leaf]
) -> tuple[tuple[int, ...], ...]:
    """The leaves in each run, in the order in which they are coded."""
    inside: list[list[int]] = [[] for _ in runs]
    used = set()
    for index, leaf in enumerate(leaves):
        expect(leaf.plain.kind < len(kinds), f'"{leaf.name}" is of an unknown kind')
        kind = kinds[leaf.plain.kind]
        used.add(leaf.plain.kind)
        if leaf.zero or leaf.mask:
            wanted = torch.int8 if leaf.zero else torch.uint8
            expect(kind.dtype is wanted, f'"{leaf.name}" is made of {kind.dtype}')
        if isinstance(kind.run, bytes):
            expect(bool(kind.run) or not leaf.plain.count, f'"{leaf.name}" has no value')
        if not isinstance(kind.run, int):
            continue
        expect(kind.run < len(runs), f'"{leaf.name}" lies in run {kind.run} of {len(runs)}')
        expect(leaf.matrix.size > 0, f'"{leaf.name}" is empty and lies in a run')
        inside[kind.run].append(index)
    # Else the tables could name chunks that hold anything at all.
    expect(used == set(range(len(kinds))), "a kind belongs to no tensor")
    expect(all(inside), "a run belongs to no tensor")
    for number, run in enumerate(runs):
        _check_run(number, run, [kinds[leaves[i].plain.kind] for i in inside[number]])
    return tuple(tuple(arranged(leaves, indices)) for indices in inside)


def chunks_of(runs: Sequence[Run], shapes: Sequence[list[Shape]], text: Text) -> tuple[Chunk, ...]:
    """The chunks of all runs, one after another. shapes: the matrices in each run"""
    chunks: list[Chunk] = []
    for number, run in enumerate(runs):
        _append(chunks, number, run, shapes[number], text)
    _check_end(chunks, text)
    return tuple(chunks)


def _check_run(number: int, run: Run, kinds: Sequence[Kind]) -> None:
    what, dtypes = f"run {number}", [kind.dtype for kind in kinds]
    centered = any(kind.center for kind in kinds)
    expect(not centered or (run.coder in CODERS and not run.changed), f"{what} has a center")
    if run.coder in CODERS:
        expect(all(dtype in INTEGERS for dtype in dtypes), f"{what} holds what are no codes")
        return
    expect(len(set(dtypes)) == 1, f"{what} holds words of several types")
    known = run.coder in word_coders(dtypes[0]) and dtypes[0] is not torch.bool
    known = known and (run.coder == "planes" or not run.changed)
    expect(known, f"{what} is coded by {run.coder!r:.40}, which does not hold {dtypes[0]}")


def _append(chunks: list[Chunk], number: int, run: Run, shapes: list[Shape], text: Text) -> None:
    """Adds the chunks of a run."""
    what = f"run {number}"
    parts: list[tuple[int, tuple[Shape, ...]]] = [(0, tuple(shapes))]
    if run.unit is not None:
        expect(len(shapes) == 1, f"{what} has several chunks and several tensors")
        along = shapes[0].columns if shapes[0].rows == 1 else shapes[0].rows
        fits = -(-along // run.unit) == len(run.lengths)
        fits = fits and (shapes[0].rows > 1 or shapes[0].states == 1)
        expect(fits, f"{what} has {len(run.lengths)} chunks of {run.unit} of {along} rows")
        parts = [(start, (shape,)) for start, shape in pieces(shapes[0], run.unit)]
    for (start, inside), length in zip(parts, run.lengths, strict=True):
        at = chunks[-1].offset + chunks[-1].length if chunks else 0
        expect(len(chunks) < len(text.digests), "a chunk has no checksum")
        laid = tuple(as_coded(shape, changed=run.changed) for shape in inside)
        chunk = Chunk(number, start, laid, at, length, text.digests[len(chunks)])
        most = MOST_EXPONENTS if run.coder == "exponents" else LARGEST_CHUNK
        expect(chunk.count <= most, f"{what} has {chunk.count} elements in a chunk")
        chunks.append(chunk)


def _check_end(chunks: Sequence[Chunk], text: Text) -> None:
    expect(len(chunks) == len(text.digests), "a checksum belongs to no chunk")
    end = text.chunks_at + (chunks[-1].offset + chunks[-1].length if chunks else 0)
    expect(end == text.file_bytes, f"its chunks end at byte {end} of {text.file_bytes}")


def check_base(base: str, kinds: Sequence[Kind], runs: Sequence[Run], features: int) -> None:
    """A file names its base, and says so in its preamble, if it needs one."""
    changed = any(run.changed for run in runs) or any(kind.run is None for kind in kinds)
    fits = changed == bool(base) == bool(features & 1)
    expect(fits and len(base) in (0, 32), "it does not say what its changes are from")
