"""Exported programs: .pt2 files, opened by torch itself and therefore trusted like code."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.errors import ModelError
from tersor.sources.code import said


def from_exported(path: Path) -> tuple[nn.Module, Any]:
    """The network in a .pt2 file with its layers under their own names, and its example inputs.

    Raises ModelError where torch cannot open it.
    """
    try:
        with _quiet():
            program = torch.export.load(path)
            model = torch.export.unflatten(program)
    # torch raises errors of many types for files that are not its own.
    except Exception as fault:
        raise ModelError(
            f"{path} cannot be opened as an exported program: {said(fault)}; write it again with "
            "torch.export.save"
        ) from fault
    for module in model.modules():
        _simplify(module)
    return model, _example(program.example_inputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps away what torch says of its own internals, and the tracebacks that it logs."""
    logger = logging.getLogger("torch.export")
    was, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.disabled = was


def _example(given: Any) -> Any:
    """One batch as `tersor` takes it; None for calls that mix positions and names."""
    if not given:
        return None
    args, kwargs = given
    if args and kwargs:
        return None
    return dict(kwargs) if kwargs else (args[0] if len(args) == 1 else args or None)


def _simplify(module: nn.Module) -> None:
    """Drops what tracing noted at the nodes, which cannot be copied, and keeps the layer's type."""
    for graph in (getattr(module, "graph", None), getattr(module, "graph_module", None)):
        graph = getattr(graph, "graph", graph)
        if isinstance(graph, torch.fx.Graph):
            for node in graph.nodes:
                node.meta.clear()
    kind = getattr(module, "type_name", None)
    if callable(kind):
        module.__dict__["kind"] = str(kind()).rpartition(".")[2]
