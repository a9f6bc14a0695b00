"""tersor unpack: a .tersor file as a safetensors checkpoint again."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.arguments import File
from tersor.cli.running import Answer


def unpack(
    file: File,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="The .safetensors file to write, or a folder for a checkpoint of several files.",
            show_default=False,
        ),
    ],
    base: Annotated[
        Path | None, typer.Option(help="The file that it was packed with as its base.")
    ] = None,
) -> Answer:
    """Writes the tensors of a .tersor file as safetensors, decoded where they were quantized."""
    from tersor.checkpoints import unpack as unpacked
    from tersor.report.checkpoints import unpack_view

    figures = {"source": str(file), **unpacked(file, out, base=base).as_json()}
    return Answer(figures, lambda: unpack_view(figures))
