"""Products whose both factors are integers: layers whose input is on a grid.

ONNX Runtime fuses them in the shapes written here: 8-bit codes with one scale per output (or per
tensor), and for convolutions no zero points. With other weights they stay products of floats.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tersor.export.onnx_forms import level_codes
from tersor.export.onnx_grids import dynamic, quantized, scale_of
from tersor.export.onnx_products import connect, transposed
from tersor.export.onnx_writer import Writer
from tersor.forms import Affine
from tersor.forms.affine import from_matrix

Uses = list[tuple[Any, int]]


def multiply_integers(form: Affine, old: Any, writer: Writer) -> bool:
    """Gives products on a grid the weight as codes; False where another operator reads `old`."""
    uses = list(old.uses())
    products = [product for use in uses for product in _products(*use)]
    if not uses or None in products or not all(quantized(node.inputs[0]) for node in products):
        return False
    convolutions = {node.op_type == "Conv" for node in products}
    kinds = {transposed(*use) for use in uses}
    axis = 0 if convolutions == {True} or kinds == {True} else 1
    if len(convolutions) != 1 or len(kinds) != 1 or form.axis not in (axis, None):
        return False
    if form.scale.shape[1] > 1 and convolutions == {True}:
        writer.notes.append("convolved as floats: the integer convolution takes no groups")
    if form.scale.shape[1] > 1 or form.dtype != torch.float32 or "codes_form" in form._modules:
        return False
    loose = [dynamic(node.inputs[0]) is not None for node in products]
    if any(loose) and (convolutions == {True} or not all(loose)):
        return False
    if convolutions == {True}:
        return _convolve(form, uses, old, writer)
    codes, scale, *zero = _factors(form, writer, transpose=kinds == {True})
    if not any(loose):
        gemms = [node for node in products if node.op_type == "Gemm"]
        if not zero and gemms:
            # ONNX Runtime makes QGemm only of weights whose zero points are written down.
            scales = _flat(form, form.scale)
            zero = [writer.store("zero", torch.zeros_like(scales, dtype=torch.int8))]
        for node in gemms:
            _whole_bias(node, form, scale, writer)
        along = {} if form.axis is None else {"axis": 1}
        connect(uses, old, writer.op("DequantizeLinear", codes, scale, *zero, **along))
    for node in products if any(loose) else []:
        _multiply(node, codes, scale, zero, writer)
    for node, _ in uses if any(loose) else []:
        if node.op_type == "Transpose":
            node.graph.remove(node, safe=True)
    writer.notes.append("multiplied as integers")
    return True


def _products(node: Any, place: int) -> list[Any]:
    """The Conv, MatMul or Gemm nodes that a use of a weight leads to; [None] for any other."""
    if node.op_type == "Conv" and place == 1:
        return [node]
    kind = transposed(node, place)
    if kind is None:
        return [None]
    return [user for user, _ in node.outputs[0].uses()] if node.op_type == "Transpose" else [node]


def _convolve(form: Affine, uses: Uses, old: Any, writer: Writer) -> bool:
    if form.zero is not None:
        writer.notes.append("convolved as floats: the integer convolution takes no zero points")
        return False
    along = {} if form.axis is None else {"axis": 0}
    weight = writer.op("DequantizeLinear", *_factors(form, writer), **along)
    weight.type, weight.shape = old.type, old.shape
    for node, place in uses:
        node.replace_input_with(place, weight)
    writer.notes.append("convolved as integers")
    return True


def _whole_bias(node: Any, form: Affine, scale: Any, writer: Writer) -> None:
    """The bias of a Gemm in 32 bits, on the scale of its sums, as QGemm takes it."""
    bias = node.inputs[2] if len(node.inputs) == 3 else None
    step = scale_of(node.inputs[0])
    if bias is None or bias.const_value is None or step.const_value is None:
        return
    steps = (float(step.const_value.numpy()) * form.scale.detach().float().flatten()).expand(
        bias.const_value.shape[-1]
    )
    codes = (torch.from_numpy(bias.const_value.numpy().copy()).flatten().double() / steps).round()
    if codes.abs().max() >= 2**31:
        return
    factor = writer.op("Mul", step, scale)
    if form.axis is None:
        factor = writer.op("Expand", factor, writer.numbers(len(codes)))
    stored = writer.store(f"bias_{len(writer.initializers)}", codes.to(torch.int32))
    node.replace_input_with(2, writer.op("DequantizeLinear", stored, factor, axis=0))


def _multiply(node: Any, codes: Any, scale: Any, zero: list[Any], writer: Writer) -> None:
    """Replaces one MatMul or Gemm. The integers times both scales, and the bias if there is one."""
    inner, source = replace(writer, nodes=[]), dynamic(node.inputs[0])
    rounded, its_scale, its_zero = source.outputs
    whole = inner.op("MatMulInteger", rounded, codes, its_zero, *zero)
    product = inner.op("Mul", inner.cast(whole, torch.float32), inner.op("Mul", its_scale, scale))
    _substitute(node, product, inner)


def _substitute(node: Any, product: Any, writer: Writer) -> None:
    """Puts `product`, and the bias of a Gemm, in the place of `node`."""
    if node.op_type == "Gemm" and len(node.inputs) == 3 and node.inputs[2] is not None:
        product = writer.op("Add", product, node.inputs[2])
    old = node.outputs[0]
    product.type, product.shape = old.type, old.shape
    old.replace_all_uses_with(product, replace_graph_outputs=True)
    node.graph.insert_before(node, writer.nodes)
    node.graph.remove(node, safe=True)


def _factors(form: Affine, writer: Writer, *, transpose: bool = False) -> list[Any]:
    """Codes, scales and, if there are any, zero points, in the types that integer products take.

    Narrow codes are stored packed and widened when the file is loaded.
    """
    codes = from_matrix(level_codes(form), form.shape, form.axis)
    packed = writer.store("codes", codes.T if transpose else codes, form.bits)
    scale = _flat(form, form.scale.detach())
    found = [
        writer.cast(packed, torch.int8),
        writer.cast(writer.store("scale", scale), torch.float32),
    ]
    if form.zero is not None:
        zero = writer.store("zero", _flat(form, form.zero), form.bits)
        found.append(writer.cast(zero, torch.int8))
    return found


def _flat(form: Affine, tensor: Tensor) -> Tensor:
    return tensor.reshape(()) if form.axis is None else tensor.reshape(-1)
