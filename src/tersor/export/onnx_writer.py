"""Writes initializers and operators of ONNX, in the smallest types that hold the values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

INT2_OPSET = 25
"""The first opset with 2-bit integers; below it they are stored as 4-bit ones."""


@dataclass
class Writer:
    """Collects what one weight becomes: its operators, its initializers and what to say about it.

    name: the weight's name, the stem of all names
    shared: constants that all weights of a graph have in common
    stored: initializer name -> (ONNX type, bytes), the promise that the written file must keep
    """

    name: str
    opset: int
    shared: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    initializers: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, tuple[str, int]] = field(default_factory=dict)

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> Any:
        """Adds a node of the standard domain and returns its output."""
        import onnx_ir

        self.nodes.append(onnx_ir.node(kind, list(inputs), attributes))
        return self.nodes[-1].outputs[0]

    def numbers(self, *values: int) -> Any:
        """A small int64 vector: a shape, axes, positions."""
        return self.constant(torch.tensor(values))

    def constant(self, tensor: Tensor) -> Any:
        """A few numbers, stored once for all weights."""
        text = "_".join(str(value) for value in tensor.flatten().tolist())
        return self.table(
            f"{str(tensor.dtype).removeprefix('torch.')}_{tensor.dim()}d_{text}", tensor
        )

    def table(self, name: str, tensor: Tensor) -> Any:
        """Numbers that all weights look up, stored once under a name."""
        if name not in self.shared:
            self.shared[name] = _initializer(name, to_array(tensor, None, self.opset))
        return self.shared[name]

    def store(self, role: str, tensor: Tensor, bits: int | None = None) -> Any:
        """An initializer of exactly `tensor`, its integers packed to `bits` where ONNX can."""
        name = f"{self.name}.{role}"
        if name not in self.initializers:
            self.initializers[name] = _initializer(name, to_array(tensor, bits, self.opset))
        value = self.initializers[name]
        self.stored[name] = (value.dtype.name, value.const_value.nbytes)
        return value

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` as `dtype`."""
        to = onnx_type(dtype)
        if value.dtype is not None and int(value.dtype) == to:
            return value
        return self.op("Cast", value, to=to)

    def reshape(self, value: Any, *shape: int) -> Any:
        """`value` in another shape."""
        return self.op("Reshape", value, self.numbers(*shape))


def to_array(tensor: Tensor, bits: int | None, opset: int) -> np.ndarray[Any, Any]:
    """`tensor` as numpy, with the types numpy lacks from ml_dtypes."""
    import ml_dtypes

    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        array = tensor.numpy()
        if bits is None or bits > 4 or tensor.dtype not in (torch.int8, torch.uint8):
            return array
        sign = "" if tensor.dtype == torch.int8 else "u"
        return array.astype(getattr(ml_dtypes, f"{sign}int{stored_bits(bits, opset)}"))
    if tensor.dtype in (torch.float64, torch.float32, torch.float16):
        return tensor.numpy()
    raw = torch.uint16 if tensor.element_size() == 2 else torch.uint8
    return tensor.view(raw).numpy().view(getattr(ml_dtypes, str(tensor.dtype).split(".")[1]))


def onnx_type(dtype: torch.dtype) -> int:
    """The number ONNX gives to a torch type."""
    import onnx_ir

    name = str(dtype).removeprefix("torch.").upper()
    spelled = {"FLOAT32": "FLOAT", "FLOAT64": "DOUBLE"}.get(name, name)
    return int(onnx_ir.DataType[spelled.replace("FLOAT8_", "FLOAT8")])


def stored_bits(bits: int, opset: int) -> int:
    """Bits of the smallest ONNX integer that holds `bits`."""
    return 2 if bits <= 2 and opset >= INT2_OPSET else 4 if bits <= 4 else 8


def _initializer(name: str, array: np.ndarray[Any, Any]) -> Any:
    import onnx_ir

    return onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name))
