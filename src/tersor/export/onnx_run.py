"""Runs an ONNX file as if it were the torch model it came from."""

from __future__ import annotations

import importlib.util
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import ExportError, MissingExtra, ModelError
from tersor.export.onnx_names import GRIDS, METADATA
from tersor.export.onnx_trace import first_line
from tersor.program.skeleton import Record

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
}


class OnnxModel(nn.Module):
    """An ONNX file that is called like the model it was exported from, on the CPU.

    Inputs go by position or by name, outputs come back arranged as the model arranged them. A file
    that tersor did not write takes its inputs in the file's order and returns a tensor, or a tuple.
    """

    def __init__(
        self, path: str | Path, *, decode: bool | None = None, threads: int | None = None
    ) -> None:
        """Loads the file.

        decode: turn weights into floats once, while loading: the outputs and roughly the speed and
            memory of the float model. False leaves it to ONNX Runtime: products on a grid and those
            of 2-D weights run on the codes, with activations rounded to 8 bits. None for False
            where the file has grids, which as floats would be slower than no grids
        threads: None for as many as torch uses
        """
        super().__init__()
        self.path = Path(path)
        if not self.path.is_file():
            raise ModelError(f"{path} is no file; write one with tersor.export.to_onnx")
        decode = not has_grids(self.path) if decode is None else decode
        try:
            self._session = session(self.path, decode=decode, threads=threads)
        except MissingExtra:
            raise
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime cannot load {path}: {first_line(error)}; export it again, or with "
                "another opset"
            ) from error
        given = self._session.get_inputs()
        self._types = {value.name: _TYPES.get(value.type, torch.float32) for value in given}
        stored = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        names = [value.name for value in self._session.get_outputs()]
        call = json.loads(stored) if stored else {}
        self._inputs: dict[str, Any] = call.get("inputs") or {name: name for name in self._types}
        tensors = [{"tensor": name} for name in names]
        self._output = call.get("output") or (
            tensors[0] if len(tensors) == 1 else {"tuple": tensors}
        )

    @property
    def input_names(self) -> list[str]:
        """Names of the arguments, in their order."""
        return list(self._inputs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, as torch tensors."""
        given = dict(zip(self._inputs, args, strict=False)) | kwargs
        unknown = given.keys() - self._inputs.keys()
        if unknown or len(args) > len(self._inputs):
            raise ModelError(
                f"{self.path.name} takes {self.input_names}, not {len(args)} inputs by position "
                f"and {sorted(kwargs)} by name"
            )
        feed: dict[str, Any] = {}
        for name, tree in self._inputs.items():
            self._collect(tree, given.get(name), name, feed)
        names = [value.name for value in self._session.get_outputs()]
        found = self._session.run(None, feed)
        tensors = {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}
        return _arranged(self._output, tensors)

    def _collect(self, tree: Any, value: Any, name: str, feed: dict[str, Any]) -> None:
        if isinstance(tree, str):
            if not isinstance(value, Tensor):
                raise ModelError(
                    f"input {name!r} of {self.path.name} must be a tensor, not {value!r}"
                )
            if tree in self._types:
                feed[tree] = value.detach().cpu().to(self._types[tree]).contiguous().numpy()
        elif isinstance(tree, Mapping):
            for key, part in tree.items():
                self._collect(part, value[key], f"{name}.{key}", feed)
        elif isinstance(tree, list):
            for index, part in enumerate(tree):
                self._collect(part, value[index], f"{name}.{index}", feed)


def has_grids(path: Path) -> bool:
    """Whether tersor wrote activations on a grid into the file."""
    # The metadata stand at the end of the file, behind all weights.
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(GRIDS.encode()) >= 0


def session(
    path: Path, *, decode: bool, threads: int | None = None, optimized: Path | None = None
) -> Any:
    """An ONNX Runtime session on the CPU; see `OnnxModel` for the options.

    optimized: where to write the graph that it runs
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtra("onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Its errors arrive as exceptions; printing them as well would only be noise.
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Threads that wait in a busy loop starve whatever else runs on few cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if decode:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _arranged(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = tree.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "list":
            return [_arranged(part, tensors) for part in content]
        case "tuple":
            return tuple(_arranged(part, tensors) for part in content)
        case "dict" | "record":
            fields = {name: _arranged(part, tensors) for name, part in content.items()}
            return Record(fields) if kind == "record" else fields
    return content
