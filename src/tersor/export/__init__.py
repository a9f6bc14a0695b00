"""Exporting: one file per runtime. Each lowers a copy of the model and proves the written file."""

from tersor.export.onnx import Exported, require, to_onnx
from tersor.export.onnx_run import OnnxModel
from tersor.export.openvino import ExportedOpenvino, to_openvino
from tersor.export.openvino_run import OpenvinoModel
from tersor.export.torch_cpu import Packed, packed

__all__ = [
    "Exported",
    "ExportedOpenvino",
    "OnnxModel",
    "OpenvinoModel",
    "Packed",
    "packed",
    "require",
    "to_onnx",
    "to_openvino",
]
