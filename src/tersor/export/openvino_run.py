"""Runs an OpenVINO file as if it were the torch model it came from."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tersor.errors import ExportError, MissingExtra, ModelError
from tersor.export.deployed import Deployed
from tersor.export.onnx_names import METADATA
from tersor.export.onnx_trace import first_line

KEY = METADATA.split(".")
"""Where a file keeps how its inputs and outputs are arranged, as JSON."""

_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
_KEPT_SIZES = 8
_TYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "i64": torch.int64,
    "i32": torch.int32,
    "boolean": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
}


class OpenvinoModel(Deployed):
    """An OpenVINO file that is called like the model it was exported from, on the CPU."""

    def __init__(
        self,
        path: str | Path,
        *,
        exact: bool = True,
        by_size: bool = False,
        threads: int | None = None,
    ) -> None:
        """Loads the file.

        exact: float32 for all that is not on a grid: the outputs of torch. False leaves the
            precision to OpenVINO, which is quicker where the processor has bfloat16
        by_size: compile the network anew for inputs of other sizes, and keep the last 8: the first
            call with a size takes as long as loading, the others skip finding out sizes
        threads: None for as many as torch uses
        """
        path = Path(path)
        if not path.is_file():
            raise ModelError(f"{path} is no file; write one with tersor.export.to_openvino")
        require_openvino()
        import openvino

        try:
            graph = openvino.Core().read_model(path)
            request = compiled(graph, exact=exact, threads=threads).create_infer_request()
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO cannot load {path}: {reason(error)}; export it again"
            ) from error
        known = graph.has_rt_info(KEY)
        call = json.loads(graph.get_rt_info(KEY).astype(str)) if known else {}
        kinds = {value.get_any_name(): value.get_element_type() for value in graph.inputs}
        types = {name: _TYPES.get(kind.to_string(), torch.float32) for name, kind in kinds.items()}
        names = [f"output_{index}" for index in range(len(graph.outputs))]
        super().__init__(path, types, call.get("names", names), call)
        self._request, self._graph = request, graph
        self._taken = {value.get_any_name(): value.partial_shape for value in graph.inputs}
        self._options: dict[str, Any] = {"exact": exact, "threads": threads}
        self._by_size: dict[tuple[Any, ...], Any] | None = {} if by_size else None

    def _run(self, feed: dict[str, Any]) -> list[Any]:
        # OpenVINO itself would compute something of a wrong size.
        for name, taken in self._taken.items():
            if not taken.compatible(type(taken)(list(feed[name].shape))):
                raise ModelError(
                    f"input {name!r} of {self.path.name} has shape {feed[name].shape}, where the "
                    f"file takes {taken}; give sizes that it was exported for"
                )
        return infer(self._request if self._by_size is None else self._for(feed), feed)

    def _for(self, feed: dict[str, Any]) -> Any:
        """The request for inputs of these sizes."""
        assert self._by_size is not None
        key = tuple(array.shape for array in feed.values())
        request = self._by_size.pop(key, None)
        if request is None:
            fixed = self._graph.clone()
            fixed.reshape({name: list(array.shape) for name, array in feed.items()})
            request = compiled(fixed, **self._options).create_infer_request()
        self._by_size[key] = request
        if len(self._by_size) > _KEPT_SIZES:
            del self._by_size[next(iter(self._by_size))]
        return request


def require_openvino() -> None:
    """Raises MissingExtra unless OpenVINO, and what writes the ONNX file before it, is there."""
    for package in ("openvino", "onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("openvino", package)


def compiled(graph: Any, *, exact: bool, threads: int | None = None) -> Any:
    """A network of OpenVINO for the CPU; see `OpenvinoModel` for the options."""
    import openvino

    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    core = openvino.Core()
    return core.compile_model(graph, "CPU", {**options, **(_EXACT if exact else {})})


def infer(request: Any, feed: Mapping[str, Any]) -> list[Any]:
    """The outputs in their order."""
    return list(request.infer(dict(feed)).values())


def reason(error: RuntimeError) -> str:
    """What OpenVINO says after the places in its own code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [line for line in lines if "src/" not in line and not line.endswith(":")]
    return own[0] if own else first_line(error)
