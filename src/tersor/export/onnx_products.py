"""Linear layers: MatMul behind DequantizeLinear, which ONNX Runtime runs on the codes themselves.

It does so (as MatMulNBits) only where the weight is (inputs, outputs), has one scale per output or
per 16, 32, 64, 128 or 256 inputs, and feeds a MatMul or Gemm directly. Everywhere else it would
decode the weight in every call, so those weights are computed by operators that it folds at load.
"""

from __future__ import annotations

from typing import Any

import torch

from tersor.export.onnx_forms import level_codes, part, sparse_codes
from tersor.export.onnx_writer import Writer
from tersor.forms import Affine

# What ONNX Runtime fuses with a Gemm before it, which then never becomes MatMulNBits.
_FUSABLE = {"Elu", "HardSigmoid", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Tanh"}

_GROUPS = (None, 16, 32, 64, 128, 256)


def multiply_codes(form: Affine, old: Any, writer: Writer) -> bool:
    """Gives every use of `old` the weight as (inputs, outputs); False where that cannot be done."""
    uses = list(old.uses())
    shapes = {transposed(node, place) for node, place in uses}
    if len(form.shape) != 2 or len(shapes) != 1 or None in shapes or form.group_size not in _GROUPS:
        return False
    # nn.Linear stores (outputs, inputs) and transposes, GPT-2's Conv1D (inputs, outputs).
    if form.axis != (0 if True in shapes else 1):
        return False
    new = _dequantized(form, writer)
    connect(uses, old, new)
    for node, _ in uses:
        if node.op_type == "Gemm":
            _apart(node)
    writer.notes.append("multiplied as codes by a default ONNX Runtime session")
    return True


def transposed(node: Any, place: int) -> bool | None:
    """Whether a product transposes its right factor; None for any other operator."""
    if node.op_type == "Gemm" and place == 1:
        return bool(node.attributes.get_int("transB", 0))
    if node.op_type == "MatMul" and place == 1:
        return False
    if node.op_type == "Transpose" and len(node.outputs[0].shape) == 2:
        users = list(node.outputs[0].uses())
        if users and all(user.op_type == "MatMul" and at == 1 for user, at in users):
            return True
    return None


def _dequantized(form: Affine, writer: Writer) -> Any:
    if sparse_codes(form, writer):
        value = part(form, "codes", writer, "", form.bits)
        codes = writer.op("Transpose", value, perm=[1, 0])
    else:
        codes = writer.store("codes", level_codes(form).T, form.bits)
    grouped = form.scale.shape[1] > 1
    scale, zero = form.scale.detach().T, None if form.zero is None else form.zero.T
    if not grouped:
        scale, zero = scale.reshape(-1), None if zero is None else zero.reshape(-1)
    inputs = [codes, writer.cast(writer.store("scale", scale), torch.float32)]
    if zero is not None:
        inputs.append(writer.store("zero", zero, form.bits))
    along = {"axis": 0, "block_size": form.group_size} if grouped else {"axis": 1}
    weight = writer.op("DequantizeLinear", *inputs, **along)
    return weight if form.dtype == torch.float32 else writer.cast(weight, form.dtype)


def connect(uses: list[tuple[Any, int]], old: Any, new: Any) -> None:
    """Gives products the right factor `new`, which is (inputs, outputs), instead of `old`."""
    import onnx_ir as ir

    outputs_first = transposed(*uses[0])
    new.type = old.type
    new.shape = ir.Shape(reversed(old.shape)) if outputs_first else old.shape
    for node, place in uses:
        if node.op_type == "Transpose":
            ir.convenience.replace_all_uses_with(node.outputs[0], new)
            node.graph.remove(node, safe=True)
        else:
            node.replace_input_with(place, new)
            if node.op_type == "Gemm":
                node.attributes.add(ir.AttrInt64("transB", 0))


def _apart(node: Any) -> None:
    """Gemm before an activation as MatMul and Sub of the negated bias: Add would be fused again."""
    import onnx_ir as ir

    bias = node.inputs[2] if len(node.inputs) == 3 else None
    if bias is None or bias.const_value is None:
        return
    if not any(user.op_type in _FUSABLE for user, _ in node.outputs[0].uses()):
        return
    name = f"{bias.name}.negative"
    negative = ir.val(name, const_value=ir.tensor(-bias.const_value.numpy(), name=name))
    node.graph.initializers[name] = negative
    product = ir.node("MatMul", list(node.inputs[:2]))
    moved = ir.node("Sub", [product.outputs[0], negative])
    old, new = node.outputs[0], moved.outputs[0]
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    node.graph.insert_before(node, [product, moved])
    node.graph.remove(node, safe=True)
