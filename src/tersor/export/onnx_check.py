"""Proves a written ONNX file: what its initializers weigh, and what it computes."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tersor.errors import ExportError
from tersor.export.compared import Difference, Trial, require_close
from tersor.export.onnx_graph import Weight
from tersor.export.onnx_run import session
from tersor.export.onnx_trace import first_line

Session = Literal["decoded", "default"]


def check_bytes(path: Path, weights: list[Weight]) -> None:
    """Raises ExportError unless the file has each promised initializer and no float copies."""
    import onnx

    graph = onnx.load(path).graph
    written = {tensor.name: tensor for tensor in graph.initializer}
    floats: dict[int, list[np.ndarray[Any, Any]]] = {}
    for tensor in (*graph.initializer, *_constants(graph)):
        if tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) > 1:
            floats.setdefault(math.prod(tensor.dims), []).append(onnx.numpy_helper.to_array(tensor))
    for weight in weights:
        for name, (kind, size) in weight.stored.items():
            found = written.get(name)
            has = "nothing" if found is None else _described(found)
            if has != f"{kind} of {size} bytes":
                raise ExportError(
                    f'weight "{weight.name}" was to be stored as {kind} of {size} bytes in '
                    f'"{name}", but the written file has {has} there; report this with the model'
                )
        _refuse_copy(weight, floats)


def _refuse_copy(weight: Weight, floats: dict[int, list[np.ndarray[Any, Any]]]) -> None:
    if weight.form is None or weight.form.shape == ():
        return
    rivals = floats.get(torch.Size(weight.form.shape).numel(), [])
    if not rivals:
        return
    # Sorted, so that a transposed or reshaped copy is found too.
    values = np.sort(weight.form.dense().detach().float().numpy(), axis=None)
    if values[0] != values[-1] and any(
        np.array_equal(np.sort(rival, axis=None), values) for rival in rivals
    ):
        raise ExportError(
            f'the written file has a float copy of weight "{weight.name}" of shape '
            f"{weight.form.shape}; report this with the model"
        )


def _constants(graph: Any) -> list[Any]:
    nodes = [node for node in graph.node if node.op_type == "Constant"]
    return [item.t for node in nodes for item in node.attribute if item.name == "value"]


def _described(tensor: Any) -> str:
    import onnx

    inside = tensor.HasField("raw_data")
    size = len(tensor.raw_data) if inside else onnx.numpy_helper.to_array(tensor).nbytes
    return f"{onnx.TensorProto.DataType.Name(tensor.data_type)} of {size} bytes"


def check_outputs(
    trial: Trial, path: Path, tolerance: float, *, rounded: bool
) -> dict[Session, Difference]:
    """Runs the file as the model was run; raises ExportError if their outputs differ.

    rounded: activations are integers in torch too, so that a default session must agree as well
    """
    found: dict[Session, Difference] = {}
    for kind in ("decoded", "default"):
        try:
            runner = session(path, decode=kind == "decoded")
            outputs = [runner.run(None, feed) for feed in trial.feeds()]
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime does not run the file ({kind} session): {first_line(error)}; "
                "try another opset or a newer onnxruntime"
            ) from error
        found[kind] = trial.difference(outputs)
    require_close(found["decoded"], tolerance)
    if rounded:
        require_close(found["default"], tolerance)
    return found


def fused(path: Path) -> dict[str, int]:
    """How many of each operator on integers a default ONNX Runtime session makes of the file."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen.onnx"
        session(path, decode=False, optimized=seen)
        counts = Counter(node.op_type for node in onnx.load(seen).graph.node)
    return {kind: count for kind, count in sorted(counts.items()) if kind in _ON_INTEGERS}


_ON_INTEGERS = frozenset(
    (
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearMatMul",
        "QLinearMul",
    )
)
