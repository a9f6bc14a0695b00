"""Says in words what each weight of a model became in the exported file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tersor.export.onnx_graph import Weight
from tersor.forms import (
    Affine,
    Bitmask,
    BitPlanes,
    BlockFloat,
    Codebook,
    Dense,
    NofM,
    ProductCodebook,
    Trellis,
)
from tersor.surgery.walk import walk

# ONNX calls the other types as torch does.
_TYPES = {"FLOAT": "float32", "DOUBLE": "float64"}


@dataclass(frozen=True)
class Layer:
    """A weight in the exported file.

    stored: "int4 in blocks of 64", "uint8 indices of 200 values", "float32", ...
    bytes: of all its initializers, scales and places included
    note: what a reader may not expect, or ""
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    bytes: int
    note: str


def layers_of(model: nn.Module, weights: list[Weight]) -> tuple[Layer, ...]:
    """Every weight: those held by forms, then those of two or more dimensions that are plain."""
    layers = [
        Layer(
            weight.name,
            tuple((weight.form or weight.tensor).shape),  # type: ignore[union-attr]
            _stored(weight),
            sum(size for _, size in weight.stored.values()),
            "; ".join(dict.fromkeys(weight.notes)),
        )
        for weight in weights
    ]
    for site in walk(model):
        if site.form is None:
            plain, kind = site.weight, str(site.weight.dtype).removeprefix("torch.")
            size, note = plain.numel() * plain.element_size(), "held by no form"
            layers.append(Layer(site.name, tuple(plain.shape), kind, size, note))
    return tuple(layers)


def _stored(weight: Weight) -> str:
    kinds = {
        name.removeprefix(f"{weight.name}."): _TYPES.get(kind, kind.lower())
        for name, (kind, _) in weight.stored.items()
    }
    form = weight.form
    if not kinds:
        return "nothing"
    match form:
        case Affine():
            return _affine(form, kinds)
        case BitPlanes():
            return f"{form.planes} planes of signs as {kinds.get('codes', 'integer')}"
        case BlockFloat():
            return f"{form.format} codes as {kinds.get('codes', 'integer')}, and a table"
        case Codebook():
            return f"{kinds.get('codes', 'integer')} indices of {form.values.numel()} values"
        case ProductCodebook():
            count, length = form.values.shape
            return f"{kinds.get('codes', 'integer')} indices of {count} times {length} values"
        case Bitmask():
            return f"a mask, and {kinds.get('values', 'integer')} where it is set"
        case NofM():
            return f"{kinds.get('values', 'integer')}, {form.n} of every {form.m}, and their places"
        case Dense():
            return kinds["stored"]
        case Trellis():
            return f"{kinds['codes']} per {'tensor' if form.step.numel() == 1 else 'channel'}"
    return kinds.get("data", "several tensors")


def _affine(form: Affine, kinds: dict[str, str]) -> str:
    kind = kinds.get("codes") or kinds.get("codes.values", "integer")
    if kind == "uint8":
        kind = "int4 packed in uint8"
    if form.scale.shape[1] > 1:
        layout = f"in blocks of {form.group_size}"
    else:
        layout = "per tensor" if form.axis is None else "per channel"
    return f"{kind} {layout}{'' if 'codes' in kinds else ', zeros left out'}"
