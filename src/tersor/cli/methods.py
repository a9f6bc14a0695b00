"""tersor methods: the techniques there are."""

from typing import Annotated

import typer

from tersor.cli.running import Answer


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this one in full.")
    ] = None,
) -> Answer:
    """Lists every technique, or shows one: what it does, when to use it, its options."""
    from tersor.methods import TABLE
    from tersor.report.views import method_view, methods_view, of_method

    if name is None:
        rows = [of_method(key, function) for key, function in TABLE.items()]
        return Answer(rows, lambda: methods_view(rows))
    if name not in TABLE:
        from tersor.errors import OptionError

        raise OptionError(f"there is no method {name!r}; the methods are {', '.join(TABLE)}")
    found = of_method(name, TABLE[name])
    return Answer(found, lambda: method_view(found))
