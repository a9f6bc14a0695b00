"""tersor pack: a safetensors checkpoint as one .tersor file."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.running import Answer


def pack(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A .safetensors file, the index of several, or their folder.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT", help="File to write. [default: the name with .tersor, if it is free]"
        ),
    ] = None,
    drop_none: Annotated[
        bool,
        typer.Option("--drop-none", help="Keep every tensor bit for bit; so it is without --bits."),
    ] = False,
    bits: Annotated[
        float | None,
        typer.Option(help="Quantize: bits for each weight of two or more dimensions, on average."),
    ] = None,
    profile: Annotated[str, typer.Option(help="How it is coded: fast, small or max.")] = "small",
    base: Annotated[
        Path | None,
        typer.Option(help="A packed file of an earlier state; only changes from it are stored."),
    ] = None,
) -> Answer:
    """Packs a checkpoint into one small file, without the network's code, and checks the file.

    Quantizing looks at the weights alone; `tersor compress` looks at what the network answers too.
    """
    from tersor.checkpoints import free_name
    from tersor.checkpoints import pack as packed
    from tersor.errors import OptionError
    from tersor.progress import Bar
    from tersor.report.checkpoints import pack_view

    if drop_none and bits is not None:
        raise OptionError(
            f"--drop-none keeps every bit and --bits {bits:g} does not; give one of the two"
        )
    target = free_name(checkpoint) if out is None else out
    with Bar("reading the checkpoint") as bar:
        found = packed(checkpoint, target, bits=bits, profile=profile, base=base, progress=bar)
    figures = {"source": str(checkpoint), **found.as_json()}
    return Answer(figures, lambda: pack_view(figures))
