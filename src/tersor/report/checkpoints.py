"""What packing and unpacking a checkpoint show."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tersor.report import figures
from tersor.report.terminal import grid, notes_view

Data = dict[str, Any]

ROWS = 8
"""Tensors that are shown: those with the largest errors."""


def pack_view(found: Data) -> RenderableType:
    """Bytes before and after, and what was lost."""
    before, after, elements = found["bytes_before"], found["bytes_after"], found["elements"]
    rows = [
        ("bytes", f"{before:,}", f"{after:,}", figures.percent(after / before)),
        ("bits per weight", _bits(before, elements), _bits(after, elements), ""),
    ]
    quantized = [tensor for tensor in found["tensors"] if tensor["stored"] == "quantized"]
    worst = sorted(quantized, key=lambda tensor: -tensor["error"])[:ROWS]
    errors = [
        (
            tensor["name"],
            figures.shape(tensor["shape"]),
            _bits(tensor["bytes"], math.prod(tensor["shape"])),
            figures.digits(tensor["error"]),
        )
        for tensor in worst
    ]
    head = ["tensor", "shape", "bits per weight", "error"]
    title = f"the {len(worst)} largest relative errors of {len(quantized)} quantized tensors"
    table: list[RenderableType] = [grid(head, errors, numeric={2, 3}, title=title), Text()]
    return Group(
        Text(f"{found['source']} -> {found['path']}", style="bold"),
        grid(["", "before", "after", ""], rows, numeric={1, 2, 3}),
        Text(),
        *(table if quantized else []),
        Text(_verdict(found, len(quantized)), style="green"),
        *notes_view(found["notes"]),
    )


def _verdict(found: Data, quantized: int) -> str:
    rest = len(found["tensors"]) - quantized
    same = "comes back byte for byte" if found["identical"] else "has its header written anew"
    if quantized:
        lost = (
            f"{quantized} tensors quantized with a relative error of "
            f"{figures.digits(found['error'])}, {rest} kept bit for bit"
        )
    else:
        lost = f"{rest} tensors kept bit for bit; unpacked, the checkpoint {same}"
    return f"{lost}; read again and compared, {found['seconds']:.1f} s"


def quantize_view(found: Data) -> RenderableType:
    """Bytes before and after, and the blocks that suffered most."""
    before, after, elements = found["bytes_before"], found["bytes_after"], found["elements"]
    rows = [
        ("bytes", f"{before:,}", f"{after:,}", figures.percent(after / before)),
        ("bits per weight", _bits(before, elements), _bits(after, elements), ""),
    ]
    known = [block for block in found["blocks"] if block["error"] is not None]
    worst = sorted(known, key=lambda block: -block["error"])[:ROWS]
    errors = [
        (block["path"], figures.digits(block["error"]), f"{block['seconds']:.1f}")
        for block in worst
    ]
    title = f"the {len(worst)} worst of {len(known)} blocks"
    head = ["block", "relative error", "seconds"]
    table: list[RenderableType] = [grid(head, errors, numeric={1, 2}, title=title), Text()]
    said = (
        f"{found['weights']:,} of {elements:,} weights quantized; read again and compared, "
        f"{found['seconds']:.1f} s"
    )
    return Group(
        Text(f"{found['source']} -> {found['path']}", style="bold"),
        grid(["", "before", "after", ""], rows, numeric={1, 2, 3}),
        Text(),
        *(table if worst else []),
        Text(said, style="green"),
        *notes_view(found["notes"]),
    )


def unpack_view(found: Data) -> RenderableType:
    """The files that were written."""
    said = (
        f"{found['source']}: {found['tensors']} tensors, {found['decoded']} of them decoded, "
        f"{figures.size(found['bytes_before'])} -> {figures.size(found['bytes_after'])}, "
        f"{found['seconds']:.1f} s"
    )
    return Group(
        Text(said, style="green"),
        *(Text(path, no_wrap=True, overflow="ignore") for path in found["paths"]),
    )


def _bits(count: int, elements: int) -> str:
    return f"{8 * count / elements:.2f}" if elements else ""
