"""Linear layers on integer kernels that torch itself has: faster without any runtime.

`packed` copies a model and swaps each linear layer that a kernel of torch fits:

- input on a grid, codes with one scale per output: products of integers (oneDNN), quickest for many
  rows
- codes of 4 bits and less: 4-bit codes multiplied by bfloat16 activations
- codes of 8 bits with one scale per output, no zero points: likewise with 8-bit codes

The last two read less memory, which pays for one or a few rows; for many, bfloat16 is quicker.
The kernels are private to torch: where a version lacks one, its layers stay as they are.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tersor.forms import Affine
from tersor.forms.affine import from_matrix, spread
from tersor.forms.grid import DynamicGrid, Grid
from tersor.surgery.grids import grid_of, scaling_of
from tersor.surgery.hold import form_of, release_all

_GROUPS = (256, 128, 64, 32)


@dataclass(frozen=True)
class Packed:
    """A model on torch's kernels.

    layers: path of each layer that was packed -> the kernel it runs on
    skipped: path of each other linear layer -> why it was not
    """

    model: nn.Module
    layers: dict[str, str]
    skipped: dict[str, str]


class _UnfitError(Exception):
    """Why no kernel fits a layer."""


def packed(model: nn.Module) -> Packed:
    """A copy of `model` for evaluation on the CPU; the model itself stays as it is.

    Outputs are those of the model but for the precision of the activations: exact to float32 where
    the input is on a grid, and to bfloat16 (0.8 % of the largest output) elsewhere. Weights that
    are not packed are decoded, once.
    """
    copied = copy.deepcopy(model).cpu().eval()
    layers: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for path, layer in list(copied.named_modules(remove_duplicate=False)):
        if not isinstance(layer, nn.Linear):
            continue
        parent_path, _, name = path.rpartition(".")
        parent = copied.get_submodule(parent_path)
        try:
            if path and _reads_weight(parent, name):
                raise _UnfitError(f"{type(parent).__name__} reads its weight itself")
            new = _packed(layer)
        except _UnfitError as reason:
            skipped[path] = str(reason)
            continue
        layers[path] = new.kernel
        if path:
            setattr(parent, name, new)
        else:
            copied = new
    release_all(copied)
    return Packed(copied, layers, skipped)


class PackedLinear(nn.Module):
    """A linear layer on one of the kernels: x (..., inputs) -> (..., outputs), in x's dtype.

    kernel: what it runs on, in words
    """

    kernel: str

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.add_module("scaling", scaling_of(layer))
        for where in ("input", "output"):
            self.add_module(f"{where}_rounding", grid_of(layer, where))

    def forward(self, x: Tensor) -> Tensor:
        scaling = self._modules["scaling"]
        rows = (x if scaling is None else scaling(x)).reshape(-1, self.in_features)
        y = self._multiply(rows).to(x.dtype).view(*x.shape[:-1], self.out_features)
        rounding = self._modules["output_rounding"]
        return y if rounding is None else rounding(y)

    def _multiply(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _rounded(self, rows: Tensor) -> Tensor:
        rounding = self._modules["input_rounding"]
        return rows if rounding is None else rounding(rows)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.in_features}, {self.out_features}, {self.kernel}"


class _Integers(PackedLinear):
    """Codes of the activations times codes of the weight, summed in 32 bits."""

    kernel = "8-bit integers"

    def __init__(self, layer: nn.Linear, form: Affine) -> None:
        super().__init__(layer)
        codes = from_matrix(_levels(form), form.shape, form.axis)
        self.register_buffer("codes", torch.ops.onednn.qlinear_prepack(codes, None))
        self.register_buffer("scale", _per_output(form, form.scale).float().contiguous())
        self.register_buffer("zero", torch.zeros(self.out_features, dtype=torch.int32))

    def _multiply(self, rows: Tensor) -> Tensor:
        codes, step, zero = self._codes(rows.float())
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, step, zero, self.codes, self.scale, self.zero, self.bias,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return product

    def _codes(self, rows: Tensor) -> tuple[Tensor, float, int]:
        """Whole numbers 0..255, their step and their zero point."""
        grid = self._modules["input_rounding"]
        if isinstance(grid, Grid):
            step, zero, low, high = float(grid.scale), int(grid.zero), grid.low, grid.high
        else:
            low, high = 0, 255
            bottom, top = (float(end) for end in torch.aminmax(rows))
            step = torch.tensor((max(top, 0.0) - min(bottom, 0.0)) / 255).item() or 1.0
            zero = round(min(max(-min(bottom, 0.0) / step, 0.0), 255.0))
        # Signed grids are moved up: the kernel is quickest for unsigned activations.
        shift = -low
        steps = (rows / step).round_().clamp_(low - zero, high - zero).add_(zero + shift)
        return steps.to(torch.uint8), step, zero + shift


class _FourBits(PackedLinear):
    """4-bit codes, unpacked in registers, times bfloat16."""

    kernel = "4-bit codes, bfloat16 activations"

    def __init__(self, layer: nn.Linear, form: Affine) -> None:
        super().__init__(layer)
        inputs = form.codes.shape[1]
        self._group = form.group_size or next(g for g in _GROUPS if inputs % g == 0)
        raised = (_levels(form).to(torch.int32) + 8).contiguous()
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(raised, 1)
        self.register_buffer("codes", codes)
        scale = form.scale.detach().float()
        zero = torch.zeros_like(scale) if form.zero is None else -form.zero.float() * scale
        pair = torch.stack([self._spread(scale), self._spread(zero)], -1)
        self.register_buffer("scale", pair.to(torch.bfloat16).transpose(0, 1).contiguous())

    def _spread(self, per_group: Tensor) -> Tensor:
        """(outputs, groups) for the kernel's groups, where one scale serves a whole row."""
        groups = self.in_features // self._group
        return per_group.expand(self.out_features, groups)

    def _multiply(self, rows: Tensor) -> Tensor:
        narrow = self._rounded(rows).to(torch.bfloat16).contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            narrow, self.codes, self._group, self.scale
        )
        return y if self.bias is None else y.float() + self.bias


class _EightBits(PackedLinear):
    """8-bit codes, widened in registers, times bfloat16."""

    kernel = "8-bit codes, bfloat16 activations"

    def __init__(self, layer: nn.Linear, form: Affine) -> None:
        super().__init__(layer)
        codes = from_matrix(_levels(form), form.shape, form.axis)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", _per_output(form, form.scale).to(torch.bfloat16).contiguous())

    def _multiply(self, rows: Tensor) -> Tensor:
        narrow = self._rounded(rows).to(torch.bfloat16).contiguous()
        y: Tensor = torch.ops.aten._weight_int8pack_mm(narrow, self.codes, self.scale)
        return y if self.bias is None else y.float() + self.bias


def _reads_weight(parent: nn.Module, name: str) -> bool:
    """Whether the forward of `parent` says `self.<name>.weight`, as that of torch's attention."""
    code = getattr(inspect.unwrap(type(parent).forward), "__code__", None)
    named = [step.argval for step in dis.get_instructions(code)] if code else []
    return (name, "weight") in pairwise(named)


def _packed(layer: nn.Linear) -> PackedLinear:
    """The layer on the kernel that fits it; raises _UnfitError."""
    if type(layer).forward is not nn.Linear.forward:
        raise _UnfitError("it has a forward of its own")
    if any(isinstance(key, int) for key in (*layer._forward_pre_hooks, *layer._forward_hooks)):
        raise _UnfitError("it has hooks of its own")
    form = form_of(layer, "weight")
    if not isinstance(form, Affine):
        raise _UnfitError("its weight is not stored as integer codes")
    if form.axis not in (0, None) or "codes_form" in form._modules:
        raise _UnfitError("its codes do not lie dense, one row per output")
    per_output = form.scale.shape[1] == 1
    grid = grid_of(layer, "input")
    static = isinstance(grid, Grid) or (isinstance(grid, DynamicGrid) and not grid.per_row)
    if static and per_output and form.zero is None and _has("onednn", "qlinear_pointwise"):
        return _Integers(layer, form)
    if form.bits <= 4:
        return _four_bits(layer, form)
    if not per_output or form.zero is not None:
        raise _UnfitError(
            f"codes of {form.bits} bits need one scale per output, and no zero points"
        )
    if layer.in_features % 32:
        # The kernel of torch 2.13 then reads behind the last row.
        raise _UnfitError(f"{layer.in_features} inputs: the kernel takes multiples of 32")
    return _made(layer, form, _EightBits, "_weight_int8pack_mm")


def _four_bits(layer: nn.Linear, form: Affine) -> PackedLinear:
    outputs, inputs = layer.out_features, layer.in_features
    if outputs % 16:
        raise _UnfitError(f"{outputs} outputs: the kernel takes multiples of 16")
    sizes = (form.group_size,) if form.scale.shape[1] > 1 else _GROUPS
    if form.axis is None or not any(g in _GROUPS and inputs % g == 0 for g in sizes):
        raise _UnfitError(
            f"{inputs} inputs, group_size={form.group_size}: the kernel takes whole groups of "
            "32, 64, 128 or 256"
        )
    return _made(layer, form, _FourBits, "_weight_int4pack_mm_for_cpu")


def _made(
    layer: nn.Linear, form: Affine, kind: Callable[[nn.Linear, Affine], PackedLinear], kernel: str
) -> PackedLinear:
    if not _has("aten", kernel):
        raise _UnfitError(f"torch {torch.__version__} has no {kernel}")
    return kind(layer, form)


def _has(library: str, kernel: str) -> bool:
    return hasattr(getattr(torch.ops, library), kernel)


def _levels(form: Affine) -> Tensor:
    """Codes whose value times the scale is the weight."""
    return form.codes * 2 + 1 if form.bits == 1 and form.zero is None else form.codes


def _per_output(form: Affine, scale: Tensor) -> Tensor:
    outputs = form.shape[0]
    return spread(scale.detach(), 1, None).reshape(-1).expand(outputs)
