"""tersor quantize: a checkpoint larger than memory, block by block."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.cli.running import Answer


def quantize(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A Hugging Face folder of a language model.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The .tersor file to write.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A text, or token ids as .npy, to calibrate with."),
    ] = None,
    method: Annotated[str, typer.Option(help="One that quantizes.")] = "quantize.gptq",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the method, bits=4; repeatable."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Taken from the data, at most.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 512,
    ends: Annotated[
        int,
        typer.Option(min=0, max=8, help="Bits of embeddings and head; 0 keeps them as they are."),
    ] = 8,
    work: Annotated[
        Path | None, typer.Option(help="Where a run keeps what is done. [default: OUT.work]")
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(min=0, help="Memory that it may use. [default: all there is]")
    ] = None,
    profile: Annotated[str, typer.Option(help="How it is coded: fast, small or max.")] = "small",
) -> Answer:
    """Quantizes a checkpoint block by block, in less memory than its weights take.

    The same command again goes on where it was stopped. `tersor pack` needs no network and no data;
    `tersor compress` meets a budget, and needs all of the network in memory.
    """
    from tersor.checkpoints import quantize_folder, read_tokens
    from tersor.report.checkpoints import quantize_view

    tokens = None
    if data is not None:
        tokens = read_tokens(data, folder, sequences=sequences, length=length)
    try:
        found = quantize_folder(
            folder,
            out,
            method=method,
            options=dict(map(_option, option or [])),
            calibration=tokens,
            ends=ends or None,
            work=work,
            memory=None if memory_gb is None else memory_gb * 1e9,
            profile=profile,
            progress=_Lines(),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from None
    figures = {"source": str(folder), **found.as_json()}
    return Answer(figures, lambda: quantize_view(figures))


def _option(text: str) -> tuple[str, Any]:
    """ "bits=4" as ("bits", 4)."""
    from tersor.errors import OptionError

    name, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"--option {text} has no value; write it as --option {text}=4")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


class _Lines:
    """Says what is done on standard error, a line at a time: such runs are long, and logged."""

    def plan(self, units: int) -> None:
        """The lines say it."""

    def doing(self, what: str) -> None:
        """One line."""
        print(what, file=sys.stderr, flush=True)

    def advance(self, units: int = 1) -> None:
        """The lines say it."""
