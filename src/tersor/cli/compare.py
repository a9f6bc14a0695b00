"""tersor compare: two models side by side."""

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli.arguments import Data, Like, Seed
from tersor.cli.running import Answer


def compare(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="The original model.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The model to compare with it.")],
    data: Data = None,
    like: Like = None,
    seed: Seed = 0,
) -> Answer:
    """What changed between two models: metrics with intervals, changed decisions, classes.

    Without --data only sizes are compared. AFTER may be a .tersor file without a graph: the code
    of BEFORE is used for it.
    """
    from tersor.cli.opening import opened
    from tersor.measure import compare as measured
    from tersor.measure import size
    from tersor.report.views import sides_view

    first, task = opened(before, data, like=like)
    second, _ = opened(after, None, like=like or before)
    sizes = {
        side: {
            "name": model.name,
            "bytes": found.bytes,
            "file_bytes": Path(spec).stat().st_size if spec.endswith(".tersor") else None,
            "parameters": found.parameters,
        }
        for side, spec, model in (("before", before, first), ("after", after, second))
        for found in [size(model.model)]
    }
    figures = {**sizes, "comparison": {"notes": ["No data were given: only sizes are compared."]}}
    if task is not None:
        figures["comparison"] = measured(first.model, second.model, task, seed=seed).as_json()
    return Answer(figures, lambda: sides_view(figures))
