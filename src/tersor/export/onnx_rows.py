"""Embeddings: only the rows asked for are decoded, so a vocabulary never unfolds to floats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tersor.export.onnx_forms import level_codes
from tersor.export.onnx_writer import Writer
from tersor.forms import Affine, Bitmask, NofM


def gather_rows(form: Affine, old: Any, writer: Writer) -> None:
    """Makes each Gather on the first dimension of `old` read codes and scales instead.

    ONNX cannot gather 4-bit integers, so those are packed by two into bytes and taken apart after.
    Where that cannot be done, or another operator needs the same weight, `old` keeps its uses.
    """
    uses = [node for node, place in old.uses() if place == 0 and _takes_rows(node)]
    if not uses or not _has_plain_rows(form):
        return
    narrow, shared = form.bits <= 4, len(uses) < len(list(old.uses()))
    if narrow and (shared or form.shape[1] % 2):
        writer.notes.append("the whole table is decoded when the model is loaded")
        return
    for node in uses:
        inner = replace(writer, nodes=[])
        rows = _rows(form, node.inputs[1], inner, narrow)
        rows.type, rows.shape = node.outputs[0].type, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(rows, replace_graph_outputs=True)
        node.graph.insert_before(node, inner.nodes)
        node.graph.remove(node, safe=True)


def _takes_rows(node: Any) -> bool:
    return bool(node.op_type == "Gather") and node.attributes.get_int("axis", 0) == 0


def _has_plain_rows(form: Affine) -> bool:
    """One row of codes and scales per row of the table, all groups whole."""
    sparse = isinstance(form._modules.get("codes_form"), Bitmask | NofM)
    whole = form.group_size is None or form.shape[-1] % form.group_size == 0
    return len(form.shape) == 2 and form.axis == 0 and whole and not sparse


def _rows(form: Affine, ids: Any, writer: Writer, narrow: bool) -> Any:
    """(codes[ids] - zero[ids]) * scale[ids], of shape (*ids.shape, width)."""
    width, groups, rank = form.shape[1], form.scale.shape[1], len(ids.shape)
    codes = level_codes(form)
    if narrow:
        levels = _unpacked(
            writer.op("Gather", writer.store("codes", pack(codes)), ids), writer, rank
        )
        levels = writer.op("Sub", levels, writer.constant(torch.tensor(8.0)))
    else:
        table = writer.store("codes", codes, form.bits)
        levels = writer.cast(writer.op("Gather", table, ids), torch.float32)
    # A 0 in a Reshape copies the dimension that is there, so any batch and length fits.
    same = (0,) * rank
    if groups > 1:
        levels = writer.reshape(levels, *same, groups, width // groups)
    if form.zero is not None:
        levels = writer.op("Sub", levels, _per_row(form.zero, "zero", ids, writer))
    found = writer.op("Mul", levels, _per_row(form.scale.detach(), "scale", ids, writer))
    if groups > 1:
        found = writer.reshape(found, *same, width)
    return found if form.dtype == torch.float32 else writer.cast(found, form.dtype)


def _per_row(tensor: Tensor, role: str, ids: Any, writer: Writer) -> Any:
    """The row's scales (or zero points), shaped to go with its groups."""
    table = tensor[..., None] if tensor.shape[1] > 1 else tensor
    return writer.cast(writer.op("Gather", writer.store(f"row_{role}", table), ids), torch.float32)


def _unpacked(packed: Any, writer: Writer, rank: int) -> Any:
    """(..., n) bytes to (..., 2 n) floats below 16, the low half of each byte first."""
    # In floats, where it is exact: OpenVINO shifts bytes otherwise than ONNX.
    bytes_ = writer.cast(packed, torch.float32)
    sixteen = writer.constant(torch.tensor(16.0))
    high = writer.op("Floor", writer.op("Div", bytes_, sixteen))
    low = writer.op("Sub", bytes_, writer.op("Mul", high, sixteen))
    last = writer.numbers(-1)
    pair = writer.op(
        "Concat", *(writer.op("Unsqueeze", half, last) for half in (low, high)), axis=-1
    )
    return writer.reshape(pair, *(0,) * rank, -1)


def pack(codes: Tensor) -> Tensor:
    """Codes in -8 .. 7, two to a byte: (rows, 2 n) to (rows, n) uint8."""
    raised = (codes.to(torch.int16) + 8).to(torch.uint8)
    return raised[:, 0::2] | (raised[:, 1::2] << 4)
