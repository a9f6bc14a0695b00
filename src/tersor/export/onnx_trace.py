"""Runs torch's exporter on a model whose forms are placeholders, and names what comes out."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as symbolic_config

from tersor.errors import CompressError, ExportError
from tersor.export.onnx_attention import tidy_attention
from tersor.export.onnx_graph import DOMAIN, Weight, fill, swap
from tersor.export.onnx_grids import fill_grids, swap_grids
from tersor.export.onnx_names import GRIDS, name_all
from tersor.export.onnx_recurrent import translations
from tersor.program.call import Call, Untraceable
from tersor.surgery.recurrent import whole_recurrences


@dataclass(frozen=True)
class Graph:
    """An onnx_ir model, the weights in it, and the names and sizes of its inputs and outputs.

    grids: how many values are rounded to integers
    """

    model: Any
    weights: list[Weight]
    grids: int
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]


def build(call: Call, tensors: list[Tensor], opset: int, *, integer_products: bool) -> Graph:
    """The ONNX graph of `call`, whose model loses its forms to placeholders."""
    kind = type(call.model).__name__
    _run_once(call, tensors, kind)
    weights, grids = swap(call.model), swap_grids(call.model)
    with quiet():
        model = _exported(call, tensors, opset, kind)
        tidy_attention(model.graph)
        pairs = fill_grids(model.graph, grids, opset)
        fill(model.graph, weights, opset, integer_products=integer_products)
    inputs, outputs = name_all(model, call, tensors)
    if pairs:
        model.metadata_props[GRIDS] = str(pairs)
    _tidied(model)
    return Graph(model, weights, pairs, inputs, outputs)


def _run_once(call: Call, tensors: list[Tensor], kind: str) -> None:
    try:
        call(*[tensor.clone() for tensor in tensors])
    except CompressError:
        raise
    except Untraceable as error:
        raise ExportError(f"{kind} cannot be exported to ONNX: {error}") from None
    except Exception as error:
        raise ExportError(
            f"{kind} fails on the example inputs: {first_line(error)}; give inputs that it accepts"
        ) from error


def _every(dim: int, rank: int) -> bool:
    return dim == 0 or rank <= 3


def _rows(dim: int, rank: int) -> bool:
    return dim == 0


def _none(dim: int, rank: int) -> bool:
    return False


# Which dimensions may vary, tried in turn; the first attempt also asks torch.export not to treat a
# size of 1 as special. Images keep their size, which runtimes use to plan memory.
_ATTEMPTS: tuple[tuple[Callable[[int, int], bool], bool], ...] = (
    (_every, True),
    (_every, False),
    (_rows, False),
    (_none, False),
)


def _exported(call: Call, tensors: list[Tensor], opset: int, kind: str) -> Any:
    reasons = []
    for free, oblivious in _ATTEMPTS:
        try:
            program = _program(call, tensors, free, oblivious)
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                optimize=True,
                opset_version=opset,
                verbose=False,
                custom_translation_table=translations(program),
            )
        except CompressError:
            raise
        except Exception as error:  # The exporter's errors are of many types.
            reasons.append(first_line(error.__cause__ or error))
        else:
            assert exported is not None
            return exported.model
    raise ExportError(
        f"{kind} cannot be exported to ONNX: {reasons[-1]}; write the part that it names with "
        "other operators, or export the part of the network that runs on the device"
    )


def _program(
    call: Call, tensors: list[Tensor], free: Callable[[int, int], bool], oblivious: bool
) -> ExportedProgram:
    kinds = {True: Dim.AUTO, False: Dim.STATIC}
    shapes = tuple(tuple(kinds[free(dim, x.dim())] for dim in range(x.dim())) for x in tensors)
    with ExitStack() as stack:
        stack.enter_context(whole_recurrences())
        if oblivious:
            stack.enter_context(symbolic_config.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
        given = tuple(tensor.clone() for tensor in tensors)
        return torch.export.export(call, given, dynamic_shapes=(shapes,), strict=False)


def _tidied(model: Any) -> None:
    """Removes what nobody reads: traces of the source code, shapes in between, unused nodes."""
    from onnx_ir.passes import common

    outer = {*model.graph.inputs, *model.graph.outputs}
    inner = [value for node in model.graph for value in node.outputs if value not in outer]
    plain = list(model.graph.initializers.values())
    for value in (*inner, *plain):
        value.shape = value.type = None
    for value in plain:
        value.name = value.name.removeprefix("model.")
    model.opset_imports.pop(DOMAIN, None)
    for step in (
        common.ClearMetadataAndDocStringPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.NameFixPass(),
    ):
        step(model)


def first_line(error: BaseException) -> str:
    """What an error says first, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the progress lines, log lines and warnings of the exporters away."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
