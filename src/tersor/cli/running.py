"""What every verb shares: --json and --debug, answers on stdout, errors as one paragraph."""

import contextlib
import errno
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text
from typer.core import TyperGroup

from tersor.errors import CompressError, OutputError

UNEXPECTED = 70
STOPPED = 130

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Answer:
    """What a verb found. data: for --json; view: what a person is shown instead."""

    data: Any
    view: Callable[[], RenderableType]


def verb(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """`function` with the options that every verb has; `Verbs` is what acts on them."""

    @wraps(function)
    def run(*, json: bool, debug: bool, **given: Any) -> Answer:
        return function(**given)

    own = signature(function)
    shared = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in _SHARED.items()
    ]
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {**function.__annotations__, **_SHARED}
    return run


_SHARED = {
    "json": Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of tables.")
    ],
    "debug": Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
}


class Verbs(TyperGroup):
    """Runs a verb, prints its answer, and turns errors into a sentence and an exit code."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Remembers the arguments: a verb's own may be wrong before it can look at them."""
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Runs the verb."""
        as_json = "--json" in ctx.meta["arguments"]
        debug = "--debug" in ctx.meta["arguments"]
        with _recorded(as_json) as output, warnings.catch_warnings():
            if not debug:
                # Of torch's own parts, which no user of a command can change.
                warnings.simplefilter("ignore", FutureWarning)
            try:
                answer = super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError, SystemExit):
                # The last is what help says where nobody reads on.
                raise
            except BaseException as error:
                if not as_json and _is_usage(error):
                    raise
                raise typer.Exit(_failed(error, output if as_json else None, debug)) from error
            if isinstance(answer, Answer):
                _print(answer, output if as_json else None)


@contextlib.contextmanager
def _recorded(as_json: bool) -> Iterator[Any]:
    """Yields standard output; with --json nothing else may print there, so prints go to stderr."""
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield output


def _print(answer: Answer, output: Any) -> None:
    if output is None:
        from tersor.report.terminal import console

        console().print(answer.view(), crop=False)
    else:
        from tersor.report.store import as_json

        output.write(as_json(answer.data) + "\n")


def _failed(error: BaseException, output: Any, debug: bool) -> int:
    """Says what went wrong, on `output` as JSON or on stderr, and returns the exit code."""
    text, code = explained(error)
    if debug:
        traceback.print_exception(error)
    if output is not None:
        output.write(json.dumps({"error": text, "exit_code": code}) + "\n")
    else:
        words = Text.assemble(("error: ", "bold red"), text)
        Console(stderr=True, soft_wrap=True, highlight=False).print(words)
    return code


def explained(error: BaseException) -> tuple[str, int]:
    """One paragraph and an exit code for anything that can be raised."""
    text = " ".join(str(error).split())
    if isinstance(error, CompressError):
        return text, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return text or "stopped; nothing was written", STOPPED
    if _is_usage(error):
        return " ".join(error.format_message().split()), error.exit_code  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return f"{text}; free space, or choose a folder that can be written", OutputError.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, or data with smaller batches", UNEXPECTED
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    said = said if len(said) <= 400 else said[:400] + "..."
    return f"something that tersor did not expect: {said}; --debug shows where", UNEXPECTED


def _is_usage(error: BaseException) -> bool:
    """True for what the parser raises: an unknown option, a missing argument."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")
