"""From a model that holds forms to an ONNX graph whose weights stay as small as the forms.

Each form is swapped for a placeholder without inputs, which the exporter cannot fold to a float
weight. Once the graph is finished, each placeholder makes way for what `onnx_forms` lowers it to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.export.onnx_forms import LOWERINGS, as_affine, lower
from tersor.export.onnx_integers import multiply_integers
from tersor.export.onnx_products import multiply_codes
from tersor.export.onnx_rows import gather_rows
from tersor.export.onnx_writer import Writer
from tersor.forms import Affine, FakeAffine, Form, Trellis
from tersor.surgery.hold import form_of, held, hold, release

DOMAIN = "tersor"


@dataclass
class Weight:
    """A form of the model, or a tensor of a form that has no lowering of its own.

    stored: initializer name -> (ONNX type, bytes), once written
    """

    names: list[str]
    form: Form | None
    tensor: Tensor | None = None
    bits: int | None = None
    stored: dict[str, tuple[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first of its names; tied weights have more."""
        return self.names[0]


class Placeholder(Form):
    """Stands for a weight while the model is exported."""

    kind = "placeholder"

    def __init__(self, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.index = index

    def dense(self) -> Tensor:
        """A node of our own that only says which weight belongs here."""
        made = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Weight",
            (),
            {"index": self.index},
            dtype=self.dtype,
            shape=self.shape,
            version=1,
        )
        assert isinstance(made, Tensor)
        return made


def swap(model: nn.Module) -> list[Weight]:
    """Puts a placeholder in the place of every form, in place, and returns what they stand for.

    Vectors are decoded: they are small, and the exporter can fold them into other constants.
    """
    weights: list[Weight] = []
    known: dict[Form, tuple[Weight, Form]] = {}
    for name, form in list(held(model)):
        path, _, attribute = name.rpartition(".")
        layer = model.get_submodule(path)
        if len(form.shape) == 1:
            if form_of(layer, attribute) is form:
                release(layer, attribute)
            continue
        if form in known:
            weight, placeholder = known[form]
            weight.names.append(name)
        elif isinstance(form, FakeAffine) or form.kind in LOWERINGS:
            final = form.freeze() if isinstance(form, FakeAffine) else form
            final = as_affine(final) if isinstance(final, Trellis) else final
            placeholder = Placeholder(len(weights), form.shape, form.dtype)
            weights.append(Weight([name], final))
            known[form] = weights[-1], placeholder
        else:
            known[form] = Weight([name], form), form
            _swap_parts(form, name, weights)
            continue
        if form_of(layer, attribute) is form:
            hold(layer, attribute, placeholder)
    return weights


def _swap_parts(form: Form, name: str, weights: list[Weight]) -> None:
    """A form this exporter does not know is traced; only its tensors are kept from folding."""
    for part, bits in form.parts():
        inner, path = form_of(form, part), f"{name}.{part}"
        if inner is not None and inner.kind not in LOWERINGS:
            _swap_parts(inner, path, weights)
            continue
        tensor = None if inner is not None else getattr(form, part).detach()
        like = inner if tensor is None else tensor
        assert like is not None
        hold(form, part, Placeholder(len(weights), tuple(like.shape), like.dtype))
        weights.append(Weight([path], inner, tensor, bits, notes=["computed when used"]))


def fill(graph: Any, weights: list[Weight], opset: int, *, integer_products: bool) -> None:
    """Replaces every placeholder of an onnx_ir graph by the lowered weight, in place."""
    nodes: dict[int, list[Any]] = {}
    shared: dict[str, Any] = {}
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "Weight":
            nodes.setdefault(node.attributes["index"].as_int(), []).append(node)
    for index, weight in enumerate(weights):
        if index not in nodes:
            weight.notes.append("unused: the forward pass never reads it")
            continue
        writer = Writer(weight.name, opset, shared, weight.notes)
        keep, *copies = nodes[index]
        for copy in copies:
            _replace(copy.outputs[0], keep.outputs[0])
        _write(weight, keep.outputs[0], writer, integer_products)
        graph.insert_before(keep, writer.nodes)
        graph.initializers.update(writer.initializers)
        weight.stored = writer.stored
        graph.remove([keep, *copies])
    graph.initializers.update(shared)


def _write(weight: Weight, old: Any, writer: Writer, integer_products: bool) -> None:
    if weight.form is None:
        assert weight.tensor is not None
        value = writer.store("data", weight.tensor, weight.bits)
        _replace(old, writer.cast(value, weight.tensor.dtype))
        return
    form = weight.form
    if (
        isinstance(form, Affine)
        and integer_products
        and form.zero_bits is None
        and (multiply_integers(form, old, writer) or multiply_codes(form, old, writer))
    ):
        return
    if isinstance(form, Affine):
        gather_rows(form, old, writer)
    if not list(old.uses()) and not old.is_graph_output():
        return
    _replace(old, lower(form, writer))


def _replace(old: Any, new: Any) -> None:
    from onnx_ir import convenience

    new.type, new.shape = old.type, old.shape
    convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
