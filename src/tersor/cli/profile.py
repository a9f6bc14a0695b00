"""tersor profile: what a model is, before anything is done to it."""

from typing import Annotated

import typer

from tersor.cli.arguments import Data, Like, Model
from tersor.cli.running import Answer


def profile(
    model: Model,
    data: Data = None,
    like: Like = None,
    threads: Annotated[int, typer.Option(help="Threads of torch while latency is measured.")] = 1,
) -> Answer:
    """Size, parameters, multiply-adds per layer, latency and quality of a model.

    Without --data quality is not measured. A .tersor file that holds its graph is then run on
    made-up inputs; other models without example inputs are not run at all.
    """
    from tersor.cli.opening import example_for, opened
    from tersor.measure import latency, macs, peak_memory, quality, safetensors_bytes, size
    from tersor.report.views import profile_view

    source, task = opened(model, data, like=like)
    found = size(source.model)
    example, notes = example_for(source, task)
    if task is not None:
        notes = [*task.notes, *notes]
    elif example is not None:
        notes = ["No data were given, so quality is not measured.", *notes]
    else:
        notes = [
            "No data were given, so the model was not run: multiply-adds, latency, memory and "
            "quality are missing. Give --data.",
            *notes,
        ]
    figures = {
        "model": {"name": source.name, "type": type(source.model).__name__},
        "size": {**found.as_json(), "bytes": found.bytes},
        "safetensors_bytes": safetensors_bytes(source.model),
        "notes": notes,
    }
    if example is not None:
        figures["macs"] = macs(source.model, example).as_json()
        figures["latency"] = latency(source.model, example, threads=threads, repeats=20).as_json()
        figures["memory"] = peak_memory(source.model, example).as_json()
    if task is not None and task.has_test:
        found_quality = quality(source.model, task)
        figures["quality"] = {name: value.as_json() for name, value in found_quality.items()}
    return Answer(figures, lambda: profile_view(figures))
