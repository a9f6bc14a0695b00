"""How each form is written in ONNX: small initializers, and operators that make a weight of them.

A runtime may fold those operators when it loads the file, or fuse them into its own kernels; what
counts here is that the file holds the codes and never a float copy of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tersor.export.onnx_writer import Writer, stored_bits, to_array
from tersor.forms import (
    Affine,
    Bitmask,
    BitPlanes,
    BlockFloat,
    Codebook,
    Dense,
    Form,
    NofM,
    ProductCodebook,
    Residual,
    Trellis,
)
from tersor.forms.bit_planes import signs
from tersor.forms.block_float import VALUES, factors
from tersor.forms.form import unrows
from tersor.forms.trellis import narrowest


def lower(form: Form, writer: Writer, role: str = "", bits: int | None = None) -> Any:
    """The value of `form` in the graph, of shape and dtype `form.shape`, `form.dtype`.

    bits: what an element needs, where the enclosing form knows better than the tensor's type
    """
    return LOWERINGS[form.kind](form, writer, role, bits)


def part(form: Form, name: str, writer: Writer, role: str, bits: int | None = None) -> Any:
    """A tensor of `form`, lowered in turn where another form holds it; dtype as in torch."""
    inner = form._modules.get(f"{name}_form")
    if isinstance(inner, Form) and inner.kind in LOWERINGS:
        return lower(inner, writer, f"{role}{name}.", bits)
    if isinstance(inner, Form):
        writer.notes.append(f"{name} decoded: the form {inner.kind!r} has no lowering")
    tensor = getattr(form, name).detach()
    bits = bits or dict(form.parts())[name]
    value = writer.store(f"{role}{name}", tensor, bits)
    packed = not tensor.is_floating_point() and bits <= 4
    return writer.cast(value, tensor.dtype) if packed else value


def _dense(form: Dense, writer: Writer, role: str, bits: int | None) -> Any:
    stored = part(form, "stored", writer, role)
    if form.scale is not None:
        along = [form.scale.numel() if dim == form.axis else 1 for dim in range(len(form.shape))]
        scale = writer.store(f"{role}scale", form.scale.detach().reshape(along))
        stored = writer.op(
            "Mul", writer.cast(stored, torch.float32), writer.cast(scale, torch.float32)
        )
    return writer.cast(stored, form.dtype)


def _codebook(form: Codebook, writer: Writer, role: str, bits: int | None) -> Any:
    table = torch.float32 if form.scale is not None else form.dtype
    values = writer.cast(part(form, "values", writer, role), table)
    places = writer.cast(part(form, "codes", writer, role), torch.int32)
    weight = writer.op("Gather", values, places, axis=0)
    if form.scale is not None:
        scale = writer.store(f"{role}scale", form.along(form.scale.detach()))
        weight = writer.op("Mul", weight, writer.cast(scale, torch.float32))
    return weight if table == form.dtype else writer.cast(weight, form.dtype)


def _product_codebook(form: ProductCodebook, writer: Writer, role: str, bits: int | None) -> Any:
    """Sub-vectors looked up, and put side by side; the last of a row cut short."""
    values = writer.cast(part(form, "values", writer, role), form.dtype)
    places = writer.cast(part(form, "codes", writer, role), torch.int32)
    matrix = writer.reshape(writer.op("Gather", values, places, axis=0), len(form.codes), -1)
    inputs = torch.Size(form.shape).numel() // len(form.codes)
    if form.codes.shape[1] * form.values.shape[1] > inputs:
        ends = (writer.numbers(0), writer.numbers(inputs), writer.numbers(1))
        matrix = writer.op("Slice", matrix, *ends)
    return _as_weight(matrix, form, writer)


def _bitmask(form: Bitmask, writer: Writer, role: str, bits: int | None) -> Any:
    """Unpacks the mask bit by bit, and gives each bit that is set the next value."""
    n = torch.Size(form.shape).numel()
    if not form.values.numel():
        return _zeros(writer, writer.numbers(*form.shape), form.dtype)
    values = writer.cast(part(form, "values", writer, role, bits), form.dtype)
    # In floats, where it is exact: OpenVINO shifts bytes otherwise than ONNX.
    column = writer.cast(writer.reshape(part(form, "mask", writer, role), -1, 1), torch.float32)
    two = writer.constant(torch.tensor(2.0))
    shifted = writer.op("Floor", writer.op("Div", column, writer.constant(2.0 ** torch.arange(8))))
    halved = writer.op("Floor", writer.op("Div", shifted, two))
    flat = writer.reshape(writer.op("Sub", shifted, writer.op("Mul", halved, two)), -1)
    kept = writer.op("Slice", flat, writer.numbers(0), writer.numbers(n))
    # Not NonZero, whose size depends on what it reads: OpenVINO cannot plan memory for that.
    whole = writer.cast(kept, torch.int32)
    before = writer.op("CumSum", whole, writer.constant(torch.tensor(0)), exclusive=1)
    last = writer.constant(torch.tensor(form.values.numel() - 1, dtype=torch.int32))
    spread = writer.op("Gather", values, writer.op("Min", before, last), axis=0)
    zero = writer.constant(torch.zeros((), dtype=form.dtype))
    filled = writer.op("Where", writer.cast(kept, torch.bool), spread, zero)
    return writer.reshape(filled, *form.shape)


def _nofm(form: NofM, writer: Writer, role: str, bits: int | None) -> Any:
    values = writer.cast(part(form, "values", writer, role, bits), form.dtype)
    places = writer.cast(part(form, "places", writer, role), torch.int64)
    outputs, groups = form.places.shape[:2]
    zeros = _zeros(writer, writer.numbers(outputs, groups, form.m), form.dtype)
    full = writer.op("ScatterElements", zeros, places, values, axis=2)
    return _as_weight(full, form, writer)


def _affine(form: Affine, writer: Writer, role: str, bits: int | None) -> Any:
    """(codes - zero) * scale, which every runtime can compute once when it loads the file.

    That is exact in float32, where both factors have at most 9 bits; a narrower weight is rounded
    once after it, as torch does.
    """
    grouped, axis = form.scale.shape[1] > 1, form.axis

    def beside(tensor: Tensor, name: str, bits: int | None = None) -> Any:
        """A scale or zero point for each group, shaped to go with the codes."""
        if grouped:
            value = writer.store(f"{role}{name}", tensor[..., None], bits)
            return _spread(writer.cast(value, torch.float32), form, writer)
        along = [tensor.numel() if dim == axis else 1 for dim in range(len(form.shape))]
        value = writer.store(f"{role}{name}", tensor.reshape(along), bits)
        return writer.cast(value, torch.float32)

    if sparse_codes(form, writer):
        codes = part(form, "codes", writer, role, form.bits)
        codes = codes if grouped else _as_weight(codes, form, writer)
    else:
        levels = level_codes(form)
        flat = levels.reshape(form.shape) if axis is None else unrows(levels, form.shape, axis)
        codes = writer.store(f"{role}codes", levels if grouped else flat, form.bits)
    if form.zero_bits is not None:
        writer.notes.append("decoded when the model is loaded: its zero points are fractions")
    weight = writer.cast(codes, torch.float32)
    weight = _in_groups(weight, form, writer) if grouped else weight
    if form.zero is not None:
        weight = writer.op("Sub", weight, beside(form.zero, "zero", form.bits))
    weight = writer.op("Mul", weight, beside(form.scale.detach(), "scale"))
    weight = weight if form.dtype == torch.float32 else writer.cast(weight, form.dtype)
    return _as_weight(weight, form, writer) if grouped else weight


def as_affine(form: Trellis) -> Affine | Trellis:
    """The same weight as codes of the fewest bits with a scale for each row, at most 8 bits.

    The form itself where its points need more, or where a step rounded to 16 bits would be another.
    """
    if form.dtype != torch.float32:
        return form
    points = form.points()
    largest = int(points.abs().max()) if points.numel() else 0
    bits = max(2, largest.bit_length() + 1)
    if bits > 8:
        return form
    return Affine(
        points.to(torch.int8),
        form.step.expand(len(points), 1),
        None,
        bits=bits,
        group_size=None,
        axis=form.axis,
        shape=form.shape,
        dtype=form.dtype,
    )


def _trellis(form: Trellis, writer: Writer, role: str, bits: int | None) -> Any:
    """Points times step; where they need 8 bits at most, `as_affine` makes less of them."""
    points = narrowest(form.points())
    if points.dtype != torch.int8:
        kind = str(points.dtype).removeprefix("torch.")
        writer.notes.append(f"stored as {kind}: it has points beyond 127")
    codes = writer.cast(writer.store(f"{role}codes", points), torch.float32)
    weight = writer.op("Mul", codes, writer.store(f"{role}step", form.step))
    weight = weight if form.dtype == torch.float32 else writer.cast(weight, form.dtype)
    return _as_weight(weight, form, writer)


def _block_float(form: BlockFloat, writer: Writer, role: str, bits: int | None) -> Any:
    """Values looked up in a table of 16: ONNX Runtime has no kernel that reads 4-bit floats.

    A negative code counts from the table's end, in ONNX as in torch.
    """
    codes = writer.cast(part(form, "codes", writer, role, form.bits), torch.int32)
    values = writer.op("Gather", writer.constant(torch.tensor(VALUES)), codes, axis=0)
    if form.tensor_scale is None:
        exponents = writer.store(f"{role}scale", form.scale[..., None])
        powers = writer.table("e8m0", factors(torch.arange(255, dtype=torch.uint8), None))
        factor = writer.op("Gather", powers, writer.cast(exponents, torch.int32), axis=0)
    else:
        whole = writer.store(f"{role}tensor_scale", form.tensor_scale)
        scale = writer.cast(writer.store(f"{role}scale", form.scale[..., None]), torch.float32)
        factor = writer.op("Mul", scale, whole)
    weight = writer.op("Mul", _in_groups(values, form, writer), _spread(factor, form, writer))
    weight = weight if form.dtype == torch.float32 else writer.cast(weight, form.dtype)
    return _as_weight(weight, form, writer)


def _residual(form: Residual, writer: Writer, role: str, bits: int | None) -> Any:
    """Base + left @ right; one weight again, so that a layer stays one product."""
    base, left, right = (
        writer.cast(part(form, name, writer, role), torch.float32)
        for name in ("base", "left", "right")
    )
    added = _as_weight(writer.op("MatMul", left, right), form, writer)
    weight = writer.op("Add", base, added)
    return weight if form.dtype == torch.float32 else writer.cast(weight, form.dtype)


def _in_groups(matrix: Any, form: Affine | BitPlanes | BlockFloat, writer: Writer) -> Any:
    """(outputs, inputs) as (outputs, groups, group_size), unless the last group is cut short."""
    outputs, inputs = form.codes.shape
    size = form.group_size or inputs
    return matrix if inputs % size else writer.reshape(matrix, outputs, -1, size)


def _bit_planes(form: BitPlanes, writer: Writer, role: str, bits: int | None) -> Any:
    """The signs of each plane, looked up, times its scales; added up in torch's order."""
    codes = writer.cast(part(form, "codes", writer, role, form.planes), torch.int32)
    codes = _in_groups(codes, form, writer)
    weight: Any = None
    for plane, table in enumerate(signs(form.planes)):
        scale = writer.store(f"{role}scale_{plane}", form.scale.detach()[..., plane, None])
        scale = _spread(writer.cast(scale, torch.float32), form, writer)
        term = writer.op("Mul", writer.op("Gather", writer.constant(table), codes, axis=0), scale)
        weight = term if weight is None else writer.op("Add", weight, term)
    weight = weight if form.dtype == torch.float32 else writer.cast(weight, form.dtype)
    return _as_weight(weight, form, writer)


def _spread(per_group: Any, form: Affine | BitPlanes | BlockFloat, writer: Writer) -> Any:
    """(outputs, groups, 1) to go with `_in_groups`."""
    outputs, inputs = form.codes.shape
    size = form.group_size or inputs
    if inputs % size == 0:
        return per_group
    wide = writer.op("Expand", per_group, writer.numbers(1, 1, size))
    flat = writer.reshape(wide, outputs, -1)
    return writer.op("Slice", flat, writer.numbers(0), writer.numbers(inputs), writer.numbers(1))


def sparse_codes(form: Affine, writer: Writer) -> bool:
    """True where the codes are held sparse and take less room so."""
    inner = form._modules.get("codes_form")
    # One-bit symmetric codes stand for -1 and +1: none of them is a zero weight.
    if not isinstance(inner, Bitmask | NofM) or (form.bits == 1 and form.zero is None):
        return False
    dense = torch.Size(inner.shape).numel() * stored_bits(form.bits, writer.opset)
    smaller = sparse_bits(inner, form.bits, writer.opset) < dense
    if not smaller:
        writer.notes.append("zeros stored: their places would take more room")
    return smaller


def _as_weight(
    matrix: Any,
    form: Affine | BitPlanes | BlockFloat | NofM | ProductCodebook | Residual | Trellis,
    writer: Writer,
) -> Any:
    """(outputs, inputs) in the weight's shape, as `unrows` does."""
    if form.axis is None:
        return writer.reshape(matrix, *form.shape)
    axis, rank = form.axis, len(form.shape)
    moved = (form.shape[axis], *form.shape[:axis], *form.shape[axis + 1 :])
    value = writer.reshape(matrix, *moved)
    rest = list(range(1, rank))
    return writer.op("Transpose", value, perm=[*rest[:axis], 0, *rest[axis:]]) if axis else value


def level_codes(form: Affine) -> Tensor:
    """Codes whose value times the scale is the weight; one-bit symmetric codes become -1 and +1."""
    one_bit = form.bits == 1 and form.zero is None
    return form.codes * 2 + 1 if one_bit else form.codes


def sparse_bits(form: Bitmask | NofM, bits: int, opset: int) -> int:
    """Bits of a sparse form in the file, where its values need `bits` each."""
    places = form.mask.numel() * 8 if isinstance(form, Bitmask) else 0
    if isinstance(form, NofM):
        places = form.places.numel() * stored_bits(dict(form.parts())["places"], opset)
    return places + form.values.numel() * stored_bits(bits, opset)


def _zeros(writer: Writer, shape: Any, dtype: torch.dtype) -> Any:
    import onnx_ir

    zero = onnx_ir.tensor(to_array(torch.zeros(1, dtype=dtype), None, writer.opset))
    return writer.op("ConstantOfShape", shape, value=zero)


LOWERINGS: dict[str, Callable[[Any, Writer, str, int | None], Any]] = {
    Affine.kind: _affine,
    BitPlanes.kind: _bit_planes,
    Bitmask.kind: _bitmask,
    BlockFloat.kind: _block_float,
    Codebook.kind: _codebook,
    Dense.kind: _dense,
    NofM.kind: _nofm,
    ProductCodebook.kind: _product_codebook,
    Residual.kind: _residual,
    Trellis.kind: _trellis,
}
