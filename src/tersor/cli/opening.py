"""The model and the task that a verb was given."""

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.sources import Opened
    from tersor.task import Task

MADE_UP = (
    "The inputs were made up: random numbers and ones, of the types and sizes that the file was "
    "saved with. Give --data for real ones."
)


def opened(
    model: str, data: str | None, *, like: str | None = None
) -> "tuple[Opened, Task | None]":
    """Opens both; the task may take its tokenizer from the model's folder."""
    from tersor.sources import open_model, open_task

    skeleton = open_model(like) if like else None
    source = open_model(model, like=copy.deepcopy(skeleton.model) if skeleton else None)
    folder = source.folder or (skeleton.folder if skeleton else None)
    return source, open_task(data, tokenizer=folder) if data else None


def example_for(source: "Opened", task: "Task | None") -> tuple[Any, list[str]]:
    """Inputs to run the model with, None where there are none, and what must be said of them.

    Made-up inputs are tried first, for the values of integers may matter: "index out of range".
    """
    from tersor.measure import evaluating

    if task is not None:
        return task.example(), []
    if not source.made_up:
        return source.example, []
    try:
        with evaluating(source.model):
            source.model(**source.example)
    except Exception as error:
        return None, [f"The network does not run on made-up inputs: {error}"]
    return source.example, [MADE_UP]
