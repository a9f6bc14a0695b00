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
    openvino = "openvino"


def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="File to write; of OpenVINO's two, the .xml.")],
    to: Annotated[Target, typer.Option(help="Format of the file.")] = Target.onnx,
    data: Data = None,
    like: Like = None,
    opset: Annotated[int, typer.Option(help="Of ONNX: operator set, 21 to 25.")] = 21,
) -> Answer:
    """Writes a model for another runtime, its weights as small as they are, and checks the file.

    --data gives the example inputs that the model is traced with; for a .tersor file that holds
    its graph they can be made up.
    """
    from tersor.cli.opening import example_for, opened
    from tersor.errors import TaskError
    from tersor.export import to_onnx, to_openvino
    from tersor.report.views import export_view

    source, task = opened(model, data, like=like)
    example, notes = example_for(source, task)
    if example is None:
        missing = (
            f"{model} brings no example inputs, and exporting to {to.value} traces the model with "
            "some; give --data"
        )
        raise TaskError(". ".join([missing, *notes]))
    if to is Target.openvino:
        figures = to_openvino(source.model, out, example=example).as_json()
    else:
        figures = to_onnx(source.model, out, example=example, opset=opset).as_json()
    figures["notes"] = [*notes, *figures["notes"]]
    return Answer(figures, lambda: export_view(figures))
