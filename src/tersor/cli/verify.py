"""tersor verify: is a file whole, and does it do what it says?"""

from tersor.cli.arguments import Data, File, Like
from tersor.cli.running import Answer

TOLERANCE = 1e-4
"""Share of a metric by which it may differ between two machines."""


def verify(file: File, data: Data = None, like: Like = None) -> Answer:
    """Checks every checksum and form in a .tersor file; with --data its stored metrics too.

    A file that does not keep its promise is an error with exit code 6.
    """
    from tersor.cli.opening import opened
    from tersor.codec import verify as checked
    from tersor.errors import FileError, TaskError
    from tersor.measure import quality
    from tersor.report.views import verify_view

    header = checked(file)
    figures = {
        "file": str(file),
        "bytes": header.file_bytes,
        "tensors": len(header.entries),
        "graph": header.program_bytes > 0,
        "metrics": {},
    }
    stored = header.metrics.get("after") or {}
    if data is not None:
        source, task = opened(str(file), data, like=like)
        if task is None or not task.has_test:
            raise TaskError(f"{data} has no labelled test data to measure {file} on; give some")
        measured = {name: estimate.value for name, estimate in quality(source.model, task).items()}
        figures["metrics"] = {
            name: {"stored": stored.get(name), "measured": value}
            for name, value in measured.items()
        }
        for name, value in measured.items():
            if name in stored and abs(value - stored[name]) > TOLERANCE * max(1.0, abs(value)):
                raise FileError(
                    f"{file} says {name}={stored[name]:g}, and on {data} it has {value:g}; give "
                    "the data that it was made with, or make it again"
                )
    return Answer(figures, lambda: verify_view(figures))
