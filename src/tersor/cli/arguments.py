"""Arguments that several verbs take, described once."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:factory, package.module:factory, a Hugging Face folder, hub:org/name, "
        "a .pt2 or a .tersor file.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="file.py:task_factory, npz:, csv:, hf:, text: or imagefolder: and a path.",
    ),
]
Like = Annotated[
    str | None,
    typer.Option(
        "--like",
        metavar="MODEL",
        help="The network that a .tersor file without a stored graph belongs to.",
    ),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A .tersor file.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap intervals.")]
