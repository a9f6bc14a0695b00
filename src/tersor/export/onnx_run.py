"""Runs an ONNX file as if it were the torch model it came from."""

from __future__ import annotations

import importlib.util
import json
import mmap
from pathlib import Path
from typing import Any

import torch

from tersor.errors import ExportError, MissingExtra, ModelError
from tersor.export.deployed import Deployed
from tersor.export.onnx_names import GRIDS, METADATA
from tersor.export.onnx_trace import first_line

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


class OnnxModel(Deployed):
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
        path = Path(path)
        if not path.is_file():
            raise ModelError(f"{path} is no file; write one with tersor.export.to_onnx")
        decode = not has_grids(path) if decode is None else decode
        try:
            runner = session(path, decode=decode, threads=threads)
        except MissingExtra:
            raise
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime cannot load {path}: {first_line(error)}; export it again, or with "
                "another opset"
            ) from error
        types = {value.name: _TYPES.get(value.type, torch.float32) for value in runner.get_inputs()}
        stored = runner.get_modelmeta().custom_metadata_map.get(METADATA)
        names = [value.name for value in runner.get_outputs()]
        super().__init__(path, types, names, json.loads(stored) if stored else {})
        self._session = runner

    def _run(self, feed: dict[str, Any]) -> list[Any]:
        try:
            found: list[Any] = self._session.run(None, feed)
        except Exception as error:
            raise ModelError(
                f"{self.path.name} does not run on these inputs: {first_line(error)}; give sizes "
                "that it was exported for"
            ) from error
        return found


def has_grids(path: Path) -> bool:
    """Whether tersor wrote activations on a grid into the file."""
    if not path.stat().st_size:
        return False
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
