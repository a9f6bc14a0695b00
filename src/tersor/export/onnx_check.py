"""Proves a written ONNX file: what its initializers weigh, and what it computes."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tersor.errors import ExportError
from tersor.export.onnx_graph import Weight
from tersor.export.onnx_run import session
from tersor.export.onnx_trace import first_line
from tersor.program.call import Call
from tersor.surgery.hold import decoded

Session = Literal["decoded", "default"]


@dataclass(frozen=True)
class Difference:
    """The largest difference between outputs of the file and of torch.

    relative: to the largest value of that output
    steps: in 255ths of that output's range, the steps that 8 bits would have
    batches: sizes of the inputs that were compared
    """

    absolute: float
    relative: float
    steps: float
    batches: tuple[dict[str, tuple[int, ...]], ...]


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
    reference: Call,
    tensors: list[Tensor],
    path: Path,
    inputs: dict[str, tuple[int | str, ...]],
    tolerance: float,
    *,
    rounded: bool,
) -> dict[Session, Difference]:
    """Runs file and model on the example and on other sizes; raises ExportError if they differ.

    rounded: activations are integers in torch too, so that a default session must agree as well
    """
    batches = [tensors, *other_sizes(reference, tensors, list(inputs.values()))]
    with decoded(reference.model):
        wanted = [reference(*[t.clone() for t in batch]) for batch in batches]
    sizes = tuple(
        dict(zip(inputs, (tuple(t.shape) for t in batch), strict=True)) for batch in batches
    )
    found: dict[Session, Difference] = {}
    for kind in ("decoded", "default"):
        try:
            runner = session(path, decode=kind == "decoded")
            outputs = [_run(runner, list(inputs), batch) for batch in batches]
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime does not run the file ({kind} session): {first_line(error)}; "
                "try another opset or a newer onnxruntime"
            ) from error
        found[kind] = difference(wanted, outputs, sizes)
    require_close(found["decoded"], tolerance)
    if rounded:
        require_close(found["default"], tolerance)
    return found


def require_close(found: Difference, tolerance: float) -> None:
    """Raises ExportError for a difference above `tolerance`."""
    if not found.relative <= tolerance:
        raise ExportError(
            f"outputs of the exported file differ from torch's by {found.relative:.3g} of the "
            f"largest output, more than tolerance={tolerance:g}; raise tolerance if that is "
            "acceptable"
        )


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


def other_sizes(
    reference: Call, tensors: list[Tensor], sizes: list[tuple[int | str, ...]]
) -> list[list[Tensor]]:
    """One row more, and where lengths are free also a shorter one if the model accepts that."""
    larger = _resized(tensors, sizes, lambda name, size: size + (name == "batch"))
    shorter = _resized(larger, sizes, lambda name, size: size - (name != "batch") * (size // 3))
    found: list[list[Tensor]] = []
    for batch, before in ((larger, tensors), (shorter, larger)):
        if any(a.shape != b.shape for a, b in zip(batch, before, strict=True)):
            # The model alone knows which sizes it takes.
            with contextlib.suppress(Exception):
                reference(*[tensor.clone() for tensor in batch])
                found.append(batch)
    return found


def _resized(
    tensors: list[Tensor],
    sizes: list[tuple[int | str, ...]],
    change: Callable[[str, int], int],
) -> list[Tensor]:
    """The tensors with each dimension of a free size cut, or filled up with its first entries."""
    found = []
    for tensor, names in zip(tensors, sizes, strict=True):
        for dim, name in enumerate(names):
            if isinstance(name, str) and name.isidentifier() and tensor.shape[dim] > 0:
                size = tensor.shape[dim]
                tensor = tensor.index_select(dim, torch.arange(change(name, size)) % size)
        found.append(tensor)
    return found


def _run(runner: Any, names: list[str], batch: list[Tensor]) -> list[np.ndarray[Any, Any]]:
    feed = {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
    outputs: list[np.ndarray[Any, Any]] = runner.run(None, feed)
    return outputs


def difference(
    wanted: list[list[Any]],
    found: list[list[np.ndarray[Any, Any]]],
    sizes: tuple[dict[str, tuple[int, ...]], ...],
) -> Difference:
    """Compares the outputs of several batches, those of torch first."""
    absolute = relative = steps = 0.0
    for batch, outputs in zip(wanted, found, strict=True):
        for number, (value, output) in enumerate(zip(batch, outputs, strict=True)):
            true, seen = torch.as_tensor(value).double(), torch.from_numpy(output).double()
            if true.shape != seen.shape:
                raise ExportError(
                    f"output {number} of the exported file has shape {tuple(seen.shape)} where "
                    f"torch has {tuple(true.shape)}; report this with the model"
                )
            # Equal infinities, as in a mask, are no difference.
            gap = torch.where(true == seen, 0.0, (true - seen).abs()).nan_to_num(nan=math.inf)
            finite = true[true.isfinite()]
            largest = finite.abs().amax().item() if finite.numel() else 0.0
            span = (finite.amax() - finite.amin()).item() if finite.numel() else 0.0
            worst = gap.amax().item() if gap.numel() else 0.0
            absolute = max(absolute, worst)
            relative = max(relative, worst / largest if largest else worst)
            steps = max(steps, 255 * worst / span if span else 0.0)
    return Difference(absolute, relative, steps, sizes)
