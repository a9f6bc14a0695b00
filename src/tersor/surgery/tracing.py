"""A network as its operators."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import ExportedProgram

from tersor.errors import ModelError
from tersor.surgery.recurrent import whole_recurrences
from tersor.task import Inputs, evaluation_mode, placed


def traced(model: nn.Module, inputs: Inputs, then: str) -> ExportedProgram:
    """What `torch.export` makes of it in evaluation mode, recurrent layers whole.

    inputs: one batch; then: what follows where it cannot be traced, for the ModelError
    """
    inputs = placed(model, inputs)
    args = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else None
    try:
        with evaluation_mode(model), whole_recurrences():
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # torch.export raises many types
        raise ModelError(
            f"{type(model).__name__} cannot be traced, so {then} ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
