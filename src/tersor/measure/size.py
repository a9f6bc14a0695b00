"""Stored size: exact bits of every tensor in the form that holds it, and the file it came from.

These are the bits before entropy coding; the written file is smaller still (`tersor inspect`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.forms.form import Form
from tersor.measure.figures import Figures
from tersor.surgery.walk import kind_of

# What safetensors calls the types, smallest elements last: that is the order it writes them in.
_SAFETENSORS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


@dataclass(frozen=True)
class TensorSize(Figures):
    """One stored tensor.

    name: "layer1.conv.weight", the first of several names of a shared one
    kind: type of the layer that owns it, "Conv2d"
    form: kind of the form that holds it ("affine"), or the dtype of a plain tensor ("float32")
    shape: of the weight, whatever the form
    parameters: its elements if it is a parameter, 0 for a buffer
    bits: what it takes
    """

    name: str
    kind: str
    form: str
    shape: tuple[int, ...]
    parameters: int
    bits: int

    @property
    def bytes(self) -> int:
        """Whole bytes."""
        return -(-self.bits // 8)


@dataclass(frozen=True)
class Size(Figures):
    """All that a model stores.

    total_bits: of all tensors
    parameters: number of weights and biases, whatever form they are in
    bits_by_form: form -> bits
    """

    total_bits: int
    parameters: int
    bits_by_form: dict[str, int]
    tensors: tuple[TensorSize, ...]

    @property
    def bytes(self) -> int:
        """Whole bytes of all tensors."""
        return -(-self.total_bits // 8)


def size(model: nn.Module) -> Size:
    """Exact stored bits of every parameter, buffer and form; shared ones count once.

    Buffers that are not part of the state dict count nothing: the model's code makes them.
    Raises ModelError for a model that stores nothing.
    """
    tensors, seen = [], set()
    for name, owner, stored in stored_tensors(model):
        if id(stored) in seen:
            continue
        seen.add(id(stored))
        tensors.append(_size_of(name, owner, stored))
    if not tensors:
        raise ModelError(
            f"{type(model).__name__} has no parameters and no buffers; pass the trained network"
        )
    by_form: dict[str, int] = {}
    for tensor in tensors:
        by_form[tensor.form] = by_form.get(tensor.form, 0) + tensor.bits
    parameters = sum(tensor.parameters for tensor in tensors)
    return Size(sum(by_form.values()), parameters, by_form, tuple(tensors))


def safetensors_bytes(model: nn.Module) -> int:
    """Bytes of the decoded state dict as a safetensors file, its header included.

    Computed from names, types and shapes; nothing is copied. A tensor with two names is written
    once, as safetensors demands. The step counters of batch norms, which only training reads, are
    left out, so that a size relative to this one is not flattered by them.
    """
    entries, seen = [], set()
    for name, _, stored in stored_tensors(model):
        if id(stored) not in seen and not name.endswith("num_batches_tracked"):
            seen.add(id(stored))
            entries.append((name, stored.dtype, tuple(stored.shape)))
    places = {dtype: place for place, dtype in enumerate(_SAFETENSORS)}
    unknown = [(name, dtype) for name, dtype, _ in entries if dtype not in places]
    if unknown:
        raise ModelError(
            f'"{unknown[0][0]}" has dtype {unknown[0][1]}, which safetensors cannot store'
        )
    header, offset = {}, 0
    for name, dtype, shape in sorted(entries, key=lambda e: (-places[e[1]], e[0])):
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS[dtype],
            "shape": shape,
            "data_offsets": (offset, end),
        }
        offset = end
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The header starts with its length in eight bytes, and is padded so that the data are aligned.
    return 8 + len(written) + -len(written) % 8 + offset


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor | Form]]:
    """(name, layer, parameter, buffer or form) under every name; what forms hold is not listed."""
    inside: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Form) or id(module) in inside:
            inside |= {id(child) for child in module.children()}
            continue
        prefix = f"{path}." if path else ""
        for name, child in module._modules.items():
            if isinstance(child, Form):
                yield f"{prefix}{name.removesuffix('_form')}", module, child
        transient = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in transient:
                yield f"{prefix}{name}", module, tensor


def _size_of(name: str, owner: nn.Module, stored: Tensor | Form) -> TensorSize:
    shape = tuple(stored.shape)
    numel = torch.Size(shape).numel()
    if isinstance(stored, Form):
        return TensorSize(name, kind_of(owner), stored.kind, shape, numel, stored.stored_bits())
    form = str(stored.dtype).removeprefix("torch.")
    counted = numel if isinstance(stored, nn.Parameter) else 0
    return TensorSize(name, kind_of(owner), form, shape, counted, numel * stored.itemsize * 8)
