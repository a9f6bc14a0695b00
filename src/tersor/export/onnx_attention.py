"""Attention as torch's exporter writes it, in the shapes that runtimes know: the same numbers.

It transposes keys through two reshapes, and searches probabilities for the NaN of a row that may
look at nothing, which its own finite masks never make. Both cost time, and keep OpenVINO from
running attention as one operator.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Far below any score, and unlike the lowest float32 finite in bfloat16: its exponential is 0.
_HIDDEN = -1e30


def tidy_attention(graph: Any) -> int:
    """Rewrites each attention of an onnx_ir graph, in place; returns how many guards are gone."""
    for node in list(graph):
        if node.op_type == "Transpose" and node.attributes["perm"].as_ints() == (0, 2, 1):
            _transpose_at_once(node)
    return sum(_without_guard(node) for node in list(graph) if node.op_type == "IsNaN")


def _transpose_at_once(node: Any) -> None:
    """Reshape, Transpose, Reshape as one: (b, h, length, width) to (b, h, width, length)."""
    import onnx_ir as ir

    before, after = node.inputs[0].producer(), _only_user(node.outputs[0])
    if after is None or before is None or {before.op_type, after.op_type} != {"Reshape"}:
        return
    keys = before.inputs[0]
    if keys.shape is None or len(keys.shape) != 4:
        return
    folded, unfolded = (_sizes_of(reshape, keys) for reshape in (before, after))
    if not folded or not unfolded or folded[1:] != unfolded[:0:-1]:
        return
    new = ir.node("Transpose", [keys], {"perm": [0, 1, 3, 2]})
    new.outputs[0].type, new.outputs[0].shape = after.outputs[0].type, after.outputs[0].shape
    after.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    node.graph.insert_before(node, new)
    node.graph.remove([after, node], safe=True)


def _sizes_of(reshape: Any, keys: Any) -> list[Any]:
    """What a Reshape takes its three sizes from, if the last two are slices of the keys' shape."""
    concat = reshape.inputs[1].producer()
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 3:
        return []
    for size in concat.inputs[1:]:
        cut = size.producer()
        shape = cut.inputs[0].producer() if cut is not None and cut.op_type == "Slice" else None
        if shape is None or shape.op_type != "Shape" or shape.inputs[0] is not keys:
            return []
    return list(concat.inputs)


def _without_guard(node: Any) -> bool:
    """Where(IsNaN(p), 0, p) as p, the softmax of scores that a finite mask was added to."""
    guard, softmax = _only_user(node.outputs[0]), node.inputs[0].producer()
    if guard is None or guard.op_type != "Where" or guard.inputs[2] is not node.inputs[0]:
        return False
    if softmax is None or softmax.op_type != "Softmax" or not _finite(softmax.inputs[0]):
        return False
    guard.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)
    node.graph.remove([guard, node], safe=True)
    return True


def _finite(scores: Any) -> bool:
    """Whether scores are a product, or one with Where(mask, 0, a low number) added to it."""
    node = scores.producer()
    if node is not None and node.op_type == "MatMul":
        return True
    mask = node.inputs[1].producer() if node is not None and node.op_type == "Add" else None
    if mask is None or mask.op_type != "Where":
        return False
    low = mask.inputs[2].const_value
    if low is None or low.size != 1 or not math.isfinite(low.numpy().item()):
        return False
    if low.numpy().item() == np.finfo(np.float32).min:
        _raise_low(mask)
    return True


def _raise_low(mask: Any) -> None:
    import onnx_ir as ir

    name, graph = "attention.hidden", mask.graph
    if name not in graph.initializers:
        array = np.array(_HIDDEN, dtype=np.float32)
        graph.initializers[name] = ir.val(name, const_value=ir.tensor(array, name=name))
    mask.replace_input_with(2, graph.initializers[name])


def _only_user(value: Any) -> Any:
    users = list(value.uses())
    return users[0][0] if len(users) == 1 else None
