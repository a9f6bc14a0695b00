"""How each form is written in ONNX: small initializers, and operators that make a weight of them.

A runtime may fold those operators when it loads the file, or fuse them into its own kernels; what
counts here is that the file holds the codes and never a float copy of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.forms import Affine, Bitmask, Codebook, Dense, Form, NofM
from tersor.forms.form import unrows

INT2_OPSET = 25
"""The first opset with 2-bit integers; below it they are stored as 4-bit ones."""


@dataclass
class Writer:
    """Collects what one weight becomes: its operators, its initializers and what to say about it.

    name: the weight's name, the stem of all names
    stored: initializer name -> (ONNX type, bytes), the promise that the written file must keep
    """

    name: str
    opset: int
    notes: list[str] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    initializers: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, tuple[str, int]] = field(default_factory=dict)

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> Any:
        """Adds a node of the standard domain and returns its output."""
        import onnx_ir

        self.nodes.append(onnx_ir.node(kind, list(inputs), attributes))
        return self.nodes[-1].outputs[0]

    def numbers(self, role: str, values: Sequence[int]) -> Any:
        """A small int64 vector: a shape, axes, positions."""
        return self._initializer(role, np.array(values, np.int64))

    def store(self, role: str, tensor: Tensor, bits: int | None = None) -> Any:
        """An initializer of exactly `tensor`, its integers packed to `bits` where ONNX can."""
        value = self._initializer(role, to_array(tensor, bits, self.opset))
        self.stored[value.name] = (value.dtype.name, value.const_value.nbytes)
        return value

    def _initializer(self, role: str, array: np.ndarray[Any, Any]) -> Any:
        import onnx_ir

        name = f"{self.name}.{role}"
        if name not in self.initializers:
            data = onnx_ir.tensor(array, name=name)
            self.initializers[name] = onnx_ir.val(name, const_value=data)
        return self.initializers[name]

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` as `dtype`."""
        to = onnx_type(dtype)
        if value.dtype is not None and int(value.dtype) == to:
            return value
        return self.op("Cast", value, to=to)

    def reshape(self, value: Any, role: str, shape: Sequence[int]) -> Any:
        """`value` in another shape."""
        return self.op("Reshape", value, self.numbers(role, shape))


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
    return writer.cast(part(form, "stored", writer, role), form.dtype)


def _codebook(form: Codebook, writer: Writer, role: str, bits: int | None) -> Any:
    values = writer.cast(part(form, "values", writer, role), form.dtype)
    places = writer.cast(part(form, "codes", writer, role), torch.int32)
    return writer.op("Gather", values, places, axis=0)


def _bitmask(form: Bitmask, writer: Writer, role: str, bits: int | None) -> Any:
    """Unpacks the mask bit by bit and scatters the values to where it is set."""
    n = torch.Size(form.shape).numel()
    values = writer.cast(part(form, "values", writer, role, bits), form.dtype)
    column = writer.reshape(part(form, "mask", writer, role), f"{role}column", (-1, 1))
    shifts = writer.store(f"{role}shifts", torch.arange(8, dtype=torch.uint8))
    one = writer.store(f"{role}one", torch.ones((), dtype=torch.uint8))
    flags = writer.op("BitwiseAnd", writer.op("BitShift", column, shifts, direction="RIGHT"), one)
    flat = writer.reshape(flags, f"{role}flat", (-1,))
    first, last = writer.numbers(f"{role}first", (0,)), writer.numbers(f"{role}last", (n,))
    kept = writer.cast(writer.op("Slice", flat, first, last), torch.bool)
    places = writer.reshape(writer.op("NonZero", kept), f"{role}places", (-1,))
    zeros = _zeros(writer, last, form.dtype)
    return writer.reshape(
        writer.op("ScatterElements", zeros, places, values, axis=0), f"{role}shape", form.shape
    )


def _nofm(form: NofM, writer: Writer, role: str, bits: int | None) -> Any:
    values = writer.cast(part(form, "values", writer, role, bits), form.dtype)
    places = writer.cast(part(form, "places", writer, role), torch.int64)
    outputs, groups = form.places.shape[:2]
    zeros = _zeros(writer, writer.numbers(f"{role}groups", (outputs, groups, form.m)), form.dtype)
    full = writer.op("ScatterElements", zeros, places, values, axis=2)
    return _as_weight(full, form, writer, role)


def _affine(form: Affine, writer: Writer, role: str, bits: int | None) -> Any:
    return affine(form, writer, role)


def affine(form: Affine, writer: Writer, role: str = "", *, transposed: bool = False) -> Any:
    """DequantizeLinear of the codes: per tensor, per axis, or in blocks for groups of inputs.

    (codes - zero) * scale is exact in float32, where both factors have at most 9 bits; a narrower
    weight is rounded once after it, as torch does.

    transposed: a 2-D weight the other way round, as MatMul reads it
    """
    axis, grouped, two = form.axis, form.scale.shape[1] > 1, len(form.shape) == 2
    if two and axis is not None:
        inputs_first = (axis == 1) != transposed
        codes = _codes(form, writer, role, inputs_first)
        blocks = {"axis": int(not inputs_first), "block_size": form.group_size or 1}
        along = blocks if grouped else {"axis": int(inputs_first)}
        return _dequantize(form, writer, role, codes, along, inputs_first)
    if grouped:
        matrix = _codes(form, writer, role, False)
        along = {"axis": 1, "block_size": form.group_size or 1}
        weight = _as_weight(_dequantize(form, writer, role, matrix, along), form, writer, role)
        return writer.op("Transpose", weight, perm=[1, 0]) if transposed else weight
    if _sparse_codes(form, writer):
        codes = _as_weight(_codes(form, writer, role, False), form, writer, role)
        codes = writer.op("Transpose", codes, perm=[1, 0]) if transposed else codes
    else:
        levels = level_codes(form)
        whole = levels.reshape(form.shape) if axis is None else unrows(levels, form.shape, axis)
        codes = writer.store(f"{role}codes", whole.T if transposed else whole, form.bits)
    return _dequantize(form, writer, role, codes, {} if axis is None else {"axis": axis})


def _codes(form: Affine, writer: Writer, role: str, inputs_first: bool) -> Any:
    """The codes as one value of shape (outputs, inputs) or (inputs, outputs)."""
    if _sparse_codes(form, writer):
        value = part(form, "codes", writer, role, form.bits)
        return writer.op("Transpose", value, perm=[1, 0]) if inputs_first else value
    codes = level_codes(form)
    return writer.store(f"{role}codes", codes.T if inputs_first else codes, form.bits)


def _sparse_codes(form: Affine, writer: Writer) -> bool:
    inner = form._modules.get("codes_form")
    # One-bit symmetric codes stand for -1 and +1: none of them is a zero weight.
    if not isinstance(inner, Bitmask | NofM) or (form.bits == 1 and form.zero is None):
        return False
    dense = torch.Size(inner.shape).numel() * stored_bits(form.bits, writer.opset)
    smaller = sparse_bits(inner, form.bits, writer.opset) < dense
    if not smaller:
        writer.notes.append("zeros stored: their places would take more room")
    return smaller


def _dequantize(
    form: Affine,
    writer: Writer,
    role: str,
    codes: Any,
    along: dict[str, int],
    inputs_first: bool = False,
) -> Any:
    def arranged(tensor: Tensor) -> Tensor:
        if "block_size" in along:
            return tensor.T if inputs_first else tensor
        return tensor.reshape(-1) if along else tensor.reshape(())

    scale = arranged(form.scale.detach())
    # Beside blocks the scales weigh enough to keep them in bfloat16.
    scale = scale if "block_size" in along else scale.float()
    inputs = [codes, writer.cast(writer.store(f"{role}scale", scale), torch.float32)]
    if form.zero is not None:
        inputs.append(writer.store(f"{role}zero", arranged(form.zero), form.bits))
    weight = writer.op("DequantizeLinear", *inputs, **along)
    return weight if form.dtype == torch.float32 else writer.cast(weight, form.dtype)


def _as_weight(matrix: Any, form: Affine | NofM, writer: Writer, role: str) -> Any:
    """(outputs, inputs) in the weight's shape, as `unrows` does."""
    if form.axis is None:
        return writer.reshape(matrix, f"{role}shape", form.shape)
    axis, rank = form.axis, len(form.shape)
    moved = (form.shape[axis], *form.shape[:axis], *form.shape[axis + 1 :])
    value = writer.reshape(matrix, f"{role}shape", moved)
    rest = list(range(1, rank))
    return writer.op("Transpose", value, perm=[*rest[:axis], 0, *rest[axis:]]) if axis else value


def level_codes(form: Affine) -> Tensor:
    """Codes whose value times the scale is the weight; one-bit symmetric codes become -1 and +1."""
    one_bit = form.bits == 1 and form.zero is None
    return form.codes * 2 + 1 if one_bit else form.codes


def stored_bits(bits: int, opset: int) -> int:
    """Bits of the smallest ONNX integer that holds `bits`."""
    return 2 if bits <= 2 and opset >= INT2_OPSET else 4 if bits <= 4 else 8


def sparse_bits(form: Bitmask | NofM, bits: int, opset: int) -> int:
    """Bits of a sparse form in the file, where its values need `bits` each."""
    places = form.mask.numel() * 8 if isinstance(form, Bitmask) else 0
    if isinstance(form, NofM):
        places = form.places.numel() * stored_bits(dict(form.parts())["places"], opset)
    return places + form.values.numel() * stored_bits(bits, opset)


def to_array(tensor: Tensor, bits: int | None, opset: int) -> np.ndarray[Any, Any]:
    """`tensor` as numpy, with the types numpy lacks from ml_dtypes."""
    import ml_dtypes

    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        array = tensor.numpy()
        if bits is None or bits > 4 or tensor.dtype not in (torch.int8, torch.uint8):
            return array
        sign = "" if tensor.dtype == torch.int8 else "u"
        return array.astype(getattr(ml_dtypes, f"{sign}int{stored_bits(bits, opset)}"))
    if tensor.dtype in (torch.float64, torch.float32, torch.float16):
        return tensor.numpy()
    raw = torch.uint16 if tensor.element_size() == 2 else torch.uint8
    return tensor.view(raw).numpy().view(getattr(ml_dtypes, str(tensor.dtype).split(".")[1]))


def onnx_type(dtype: torch.dtype) -> int:
    """The number ONNX gives to a torch type."""
    import onnx_ir

    name = str(dtype).removeprefix("torch.").upper()
    spelled = {"FLOAT32": "FLOAT", "FLOAT64": "DOUBLE"}.get(name, name)
    return int(onnx_ir.DataType[spelled.replace("FLOAT8_", "FLOAT8")])


def _zeros(writer: Writer, shape: Any, dtype: torch.dtype) -> Any:
    import onnx_ir

    zero = onnx_ir.tensor(to_array(torch.zeros(1, dtype=dtype), None, writer.opset))
    return writer.op("ConstantOfShape", shape, value=zero)


LOWERINGS: dict[str, Callable[[Any, Writer, str, int | None], Any]] = {
    Affine.kind: _affine,
    Bitmask.kind: _bitmask,
    Codebook.kind: _codebook,
    Dense.kind: _dense,
    NofM.kind: _nofm,
}
