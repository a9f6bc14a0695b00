"""Writes a compressed model as an ONNX file whose weights stay compressed, and proves the file.

What is written: codes of 5 to 8 bits as INT8 and of 1 to 4 bits as INT4, two to a byte (from opset
25 on codes of 1 and 2 bits as INT2); codebooks as indices with Gather; masks as bits, which count
the values before each; N:M places with ScatterElements; narrow floats with Cast. Linear layers read
their codes through DequantizeLinear, which ONNX Runtime fuses into the product; other codes are
cast and scaled when it loads the file. Grids on activations become QuantizeLinear and
DequantizeLinear, so that products run on integers.

Before the file gets its name, its initializers are read back and counted, and its outputs are
compared with torch's.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import MissingExtra, OptionError
from tersor.export.compared import Difference, Trial, check_tolerance, tolerance_for
from tersor.export.onnx_check import Session, check_bytes, check_outputs, fused
from tersor.export.onnx_file import SINGLE_FILE_LIMIT, replaced, save
from tersor.export.onnx_layers import layers_of
from tersor.export.onnx_trace import build
from tersor.export.written import Written
from tersor.program.call import call_of

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Exported(Written):
    """A written ONNX file; above 2 GB a data file stands beside it.

    A session with default options rounds activations to 8 bits in order to multiply by the codes of
    linear layers; `difference` is from one that decodes weights when it loads the file.

    fused: operators on integers that a default session runs, "QLinearConv" -> 19
    """

    opset: int
    fused: dict[str, int]


def to_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example: Inputs,
    opset: int = 21,
    integer_products: bool = True,
    check: bool = True,
    tolerance: float | None = None,
) -> Exported:
    """Writes `model` to `path`, each weight as small as its form. The model stays as it is.

    Batch size and lengths stay free where the model leaves them free; images keep their size.

    example: one batch: a tensor, a tuple for model(*x) or a dict for model(**x)
    opset: 21 to 25; 25 also has 2-bit integers, which an older ONNX Runtime does not read
    integer_products: let ONNX Runtime multiply by the codes of linear layers: least memory and
        quickest for small batches, but a session with default options rounds activations to 8 bits
        for it. False: torch's outputs in every session
    check: run the file and compare its outputs with torch's, on the example and on a larger batch
    tolerance: largest difference allowed, relative to the largest output: 1e-4, and 0.05 with
        grids, where the last bit of a sum decides how a value is rounded, and what follows from it

    Raises ExportError when the model cannot be exported, a weight became larger than its form, or
    outputs differ; what was at `path` before is then still there.
    """
    require(check)
    if not 21 <= opset <= 25:
        raise OptionError(
            f"opset={opset}; 4-bit weights need 21, and 25 is the last one known here"
        )
    check_tolerance(tolerance)
    reference = copy.deepcopy(model).cpu().eval()
    args, kwargs = as_call(example)
    with torch.no_grad(), replaced(Path(path)) as temporary:
        wanted, tensors = call_of(reference, args, kwargs)
        call, _ = call_of(copy.deepcopy(reference), args, kwargs)
        graph = build(call, tensors, opset, integer_products=integer_products)
        layers = layers_of(reference, graph.weights)
        size = save(graph.model, temporary)
        check_bytes(temporary, graph.weights)
        found: dict[Session, Difference] = {}
        counts: dict[str, int] = {}
        allowed = tolerance_for(tolerance, graph.grids)
        notes = [*call.omitted]
        if check:
            trial = Trial.of(wanted, tensors, graph.inputs)
            found = check_outputs(trial, temporary, allowed, rounded=graph.grids > 0)
            counts = fused(temporary) if size < SINGLE_FILE_LIMIT else {}
            notes = [*_notes(found, allowed), *trial.notes, *notes]
    return Exported(
        path=Path(path),
        bytes=size,
        opset=opset,
        runtime=_runtime() if check else None,
        inputs=graph.inputs,
        outputs=graph.outputs,
        layers=layers,
        difference=found.get("decoded"),
        default_difference=found.get("default"),
        grids=graph.grids,
        fused=counts,
        notes=(*_fixed_rows(graph.inputs), *notes),
    )


def _fixed_rows(inputs: dict[str, tuple[int | str, ...]]) -> list[str]:
    return [
        f'the number of rows of input "{name}" is fixed at {sizes[0]}'
        for name, sizes in inputs.items()
        if sizes and isinstance(sizes[0], int)
    ]


def _notes(found: dict[Session, Difference], tolerance: float) -> list[str]:
    if found["default"].relative <= tolerance:
        return []
    return [
        "ONNX Runtime with default options multiplies by the codes of linear layers and rounds "
        f"activations to 8 bits: outputs differ from torch's by {found['default'].relative:.2g} of "
        "the largest; session.disable_quant_qdq=1 or integer_products=False keeps them exact"
    ]


def as_call(example: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One batch as the arguments of a call, on the CPU."""
    if isinstance(example, Mapping):
        return (), {name: _on_cpu(value) for name, value in example.items()}
    given = example if isinstance(example, tuple) else (example,)
    return tuple(_on_cpu(value) for value in given), {}


def _on_cpu(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value)


def require(check: bool) -> None:
    """Raises MissingExtra unless what exporting, and checking if wanted, needs is installed."""
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("onnx", package)


def _runtime() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"
