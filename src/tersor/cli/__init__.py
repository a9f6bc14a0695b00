"""The command line: one file per verb, each a few lines that call the library."""

import os

import typer

from tersor.cli.compare import compare
from tersor.cli.compress import compress
from tersor.cli.export import export
from tersor.cli.inspect import inspect
from tersor.cli.methods import methods
from tersor.cli.pack import pack
from tersor.cli.profile import profile
from tersor.cli.quantize import quantize
from tersor.cli.report import report
from tersor.cli.running import Verbs, verb
from tersor.cli.unpack import unpack
from tersor.cli.verify import verify

app = typer.Typer(
    name="tersor",
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _verb in (
    *(profile, compress, compare, verify, inspect, report, export),
    *(pack, unpack, quantize, methods),
):
    app.command()(verb(_verb))


def _version(wanted: bool) -> None:
    if wanted:
        from tersor.version import VERSION

        typer.echo(f"tersor {VERSION}")
        raise typer.Exit


@app.callback()
def _tersor(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Makes trained networks small, and proves on the written file that they still do their job."""


def main() -> None:
    """What the command `tersor` runs."""
    # Read once, when torch loads OpenMP: idle threads that spin starve the other cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app(prog_name="tersor")
