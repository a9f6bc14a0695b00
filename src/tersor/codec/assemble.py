"""Puts the tensors of a file and its program together into a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tersor.codec.errors import Unreadable
from tersor.codec.header import Entry
from tersor.errors import CompressError, ExportError
from tersor.forms import Form
from tersor.program.interpreter import Interpreted
from tersor.program.program import Program
from tersor.program.skeleton import skeleton
from tersor.surgery.hold import hold


def assembled(
    entries: Sequence[Entry], items: Sequence[Tensor | Form], program: Program
) -> nn.Module:
    """The skeleton of the saved model, its tensors, and the program that runs on them."""
    tensors = {
        # A form's place is kept by one number seen in the weight's shape.
        name: item if isinstance(item, Tensor) else torch.empty(()).expand(item.shape)
        for entry, item in zip(entries, items, strict=True)
        for name in entry.names
    }
    try:
        model = Interpreted(program, skeleton(tensors, program.kinds, program.buffers))
        for entry, item in zip(entries, items, strict=True):
            if isinstance(item, Form):
                for name in entry.names:
                    layer, _, leaf = name.rpartition(".")
                    hold(model.get_submodule(layer), leaf, item)
    except (AttributeError, KeyError, TypeError, RuntimeError, CompressError) as error:
        raise Unreadable(f"its graph and its tensors do not fit together: {error}") from None
    return model


def check_rebuildable(entries: Sequence[Entry], program: Program, name: str) -> None:
    """Raises ExportError unless a file of these entries and this program can be loaded."""
    shapes = [torch.empty(()).expand(entry.tensor.shape) for entry in entries]
    try:
        assembled(entries, shapes, program)
    except (Unreadable, CompressError) as error:
        raise ExportError(
            f"{name} cannot be rebuilt from a graph: {error}; rename that part of the model, or "
            "store the weights alone with graph=False"
        ) from None
