"""Exporting: one file per runtime. Each lowers a copy of the model and proves the written file."""

from tersor.export.onnx import Exported, require, to_onnx
from tersor.export.onnx_run import OnnxModel

__all__ = ["Exported", "OnnxModel", "require", "to_onnx"]
