"""Writes a compressed model as an OpenVINO file, whose weights stay compressed, and proves it.

The way leads over the ONNX file: what `onnx` says about forms and grids holds here as well. What
lies on a grid is multiplied in integers. For the rest OpenVINO takes bfloat16 where the processor
has it, and rounds activations beside coded weights to 8 bits; an exact session keeps float32.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.errors import ExportError, OptionError
from tersor.export.compared import Trial, check_tolerance, require_close, tolerance_for
from tersor.export.onnx import Exported, Inputs, as_call, to_onnx
from tersor.export.onnx_file import replaced
from tersor.export.onnx_names import METADATA
from tersor.export.openvino_run import KEY, compiled, infer, reason, require_openvino
from tersor.export.written import Written
from tersor.forms import Affine, BlockFloat
from tersor.program.call import call_of
from tersor.surgery.hold import held

_PRODUCTS = frozenset(("Convolution", "Deconvolution", "FullyConnected", "MatMul"))


@dataclass(frozen=True)
class ExportedOpenvino(Written):
    """A written OpenVINO network, an .xml and a .bin file.

    `difference` is from torch in an exact session, `default_difference` with OpenVINO's own choice
    of precision.

    products: convolutions and matrix products by the precision that an exact session runs them in,
        "Convolution u8" -> 19
    """

    products: dict[str, int]


def to_openvino(
    model: nn.Module,
    path: str | Path,
    *,
    example: Inputs,
    check: bool = True,
    tolerance: float | None = None,
) -> ExportedOpenvino:
    """Writes `model` to `path`, a name that ends in .xml, and to the .bin file beside it.

    example: one batch: a tensor, a tuple for model(*x) or a dict for model(**x)
    check: run the file and compare its outputs with torch's, on the example and on a larger batch
    tolerance: largest difference allowed, relative to the largest output; as in `to_onnx`

    Raises ExportError when the model cannot be exported or outputs differ; what was at `path`
    before is then still there.
    """
    path = Path(path)
    require_openvino()
    if path.suffix != ".xml":
        raise OptionError(f"{path} does not end in .xml, by which OpenVINO knows its files")
    check_tolerance(tolerance)
    _check_groups(model)
    with tempfile.TemporaryDirectory() as folder, replaced(path) as temporary:
        onnx, graph = _graph(model, Path(folder) / "model.onnx", example)
        graph.set_rt_info(_call_of_file(onnx.path), KEY)
        _save(graph, temporary)
        size = sum(file.stat().st_size for file in temporary.parent.iterdir())
        done = _exported(onnx, path, size)
        return _checked(done, model, example, temporary, tolerance) if check else done


def _graph(model: nn.Module, path: Path, example: Inputs) -> tuple[Exported, Any]:
    """The ONNX file at `path`, and OpenVINO's reading of it."""
    import openvino

    done = to_onnx(model, path, example=example, check=False)
    try:
        return done, openvino.Core().read_model(path)
    except RuntimeError as error:
        raise ExportError(
            f"OpenVINO does not read the ONNX file: {reason(error)}; export to ONNX alone"
        ) from error


def _check_groups(model: nn.Module) -> None:
    """OpenVINO 2026.4 ends the process on a matrix whose last group is cut short."""
    for name, form in held(model):
        if not isinstance(form, Affine | BlockFloat) or len(form.shape) != 2:
            continue
        size = form.group_size
        if size and form.codes.shape[1] % size:
            raise OptionError(
                f"group_size={size} cuts the last group of {name!r} of shape {form.shape} short, "
                "which OpenVINO does not take; choose a size that divides the inputs"
            )


def _save(graph: Any, path: Path) -> None:
    import openvino

    openvino.save_model(graph, path, compress_to_fp16=False)


def _call_of_file(path: Path) -> str:
    """How the inputs and outputs are arranged, and the names of the outputs in their order."""
    import onnx

    proto = onnx.load(path)
    stored = {entry.key: entry.value for entry in proto.metadata_props}
    names = [value.name for value in proto.graph.output]
    return json.dumps({**json.loads(stored[METADATA]), "names": names})


def _exported(onnx: Exported, path: Path, size: int) -> ExportedOpenvino:
    notes = list(onnx.notes)
    # The graph itself, as XML, is some hundred bytes for each operator.
    if size > 1.1 * onnx.bytes + 2**20:
        notes.append(
            f"the ONNX file takes {onnx.bytes} bytes, this one {size}: OpenVINO decoded weights"
        )
    return ExportedOpenvino(
        path=path,
        bytes=size,
        runtime=None,
        inputs=onnx.inputs,
        outputs=onnx.outputs,
        layers=tuple(replace(layer, note="") for layer in onnx.layers),
        difference=None,
        default_difference=None,
        grids=onnx.grids,
        products={},
        notes=tuple(notes),
    )


def _checked(
    done: ExportedOpenvino, model: nn.Module, example: Inputs, path: Path, tolerance: float | None
) -> ExportedOpenvino:
    """`done` with what running the file shows; raises ExportError for a difference from torch."""
    import openvino

    args, kwargs = as_call(example)
    with torch.no_grad():
        reference, tensors = call_of(copy.deepcopy(model).cpu().eval(), args, kwargs)
        trial = Trial.of(reference, tensors, done.inputs)
        try:
            graph = openvino.Core().read_model(path)
            runners = {exact: compiled(graph, exact=exact) for exact in (True, False)}
            found = {
                exact: [infer(runner.create_infer_request(), feed) for feed in trial.feeds()]
                for exact, runner in runners.items()
            }
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO does not run the file: {reason(error)}; export to ONNX alone"
            ) from error
    exact, free = (trial.difference(found[kind]) for kind in (True, False))
    allowed = tolerance_for(tolerance, done.grids)
    require_close(exact, allowed)
    notes = [*done.notes, *trial.notes]
    if free.relative > allowed:
        notes.append(
            "OpenVINO's own choice of precision differs from torch by "
            f"{free.relative:.2g} of the largest output; INFERENCE_PRECISION_HINT=f32 and "
            "DYNAMIC_QUANTIZATION_GROUP_SIZE=0, or OpenvinoModel, keep float32"
        )
    return replace(
        done,
        runtime=f"openvino {openvino.__version__}",
        difference=exact,
        default_difference=free,
        products=_products(runners[True]),
        notes=tuple(notes),
    )


def _products(compiled: Any) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind = info["layerType"].astype(str)
        if kind in _PRODUCTS:
            counts[f"{kind} {info['runtimePrecision'].astype(str)}"] += 1
    return dict(sorted(counts.items()))
