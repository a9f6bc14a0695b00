"""tersor export: a model as a file for another runtime."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.arguments import Data, Like, Model
from tersor.cli.running import Answer


class Target(StrEnum):
    """Runtimes that there is an exporter for."""

    onnx = "onnx"


def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="File to write.")],
    to: Annotated[Target, typer.Option(help="Format of the file.")] = Target.onnx,
    data: Data = None,
    like: Like = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 21 to 25.")] = 21,
) -> Answer:
    """Writes a model for another runtime, its weights as small as they are, and checks the file.

    --data gives the example inputs that the model is traced with.
    """
    from tersor.cli.opening import opened
    from tersor.errors import TaskError
    from tersor.export import to_onnx
    from tersor.report.views import export_view

    source, task = opened(model, data, like=like)
    example = task.example() if task is not None else source.example
    if example is None:
        raise TaskError(
            f"{model} brings no example inputs, and exporting to {to.value} traces the model with "
            "some; give --data"
        )
    figures = to_onnx(source.model, out, example=example, opset=opset).as_json()
    return Answer(figures, lambda: export_view(figures))
