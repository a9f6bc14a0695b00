"""tersor inspect: what is in a file."""

from tersor.cli.arguments import File
from tersor.cli.running import Answer


def inspect(file: File) -> Answer:
    """Tensors, forms, bytes, recipe and metrics of a .tersor file; its tensors are not read."""
    from tersor.codec import read_header
    from tersor.report.views import header_view, of_header

    figures = {"file": str(file), **of_header(read_header(file))}
    return Answer(figures, lambda: header_view(figures))
