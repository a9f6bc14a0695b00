"""The errors a caller may catch. Each carries the exit code that the command line returns for it.

A message names the thing (option and value, layer and shape, file), the rule broken, and one way
out.
"""


class CompressError(Exception):
    """Anything tersor refuses to do; the message says why and what to do instead."""

    exit_code = 1


class OptionError(CompressError, ValueError):
    """An option, a recipe or a pattern that cannot be used as given."""

    exit_code = 2


class ModelError(CompressError):
    """A model that cannot be found, imported or used: no parameters, NaN weights, wrong outputs."""

    exit_code = 3


class TaskError(CompressError):
    """Data that cannot be used: missing, empty, of the wrong shape or type, or not finite."""

    exit_code = 4


class BudgetError(CompressError):
    """A budget that contradicts itself, or that was tried and is out of reach."""

    exit_code = 5


class FileError(CompressError):
    """A file or message that is damaged, hostile, or of a version this tersor does not know."""

    exit_code = 6


class ExportError(CompressError):
    """A model that cannot be traced or exported, or whose export does not behave like it."""

    exit_code = 7


class OutputError(CompressError, OSError):
    """A result that cannot be written: folder not writable, disk full."""

    exit_code = 8


class MissingExtra(CompressError, ImportError):
    """An optional dependency that is not installed."""

    exit_code = 9

    def __init__(self, extra: str, package: str) -> None:
        """Says which `pip install` brings `package`."""
        super().__init__(
            f'{package} is not installed; `pip install "tersor[{extra}]"` brings it '
            "(keep torch pinned while you do: see README)"
        )
