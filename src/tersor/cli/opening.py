"""The model and the task that a verb was given."""

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tersor.sources import Opened
    from tersor.task import Task


def opened(
    model: str, data: str | None, *, like: str | None = None
) -> "tuple[Opened, Task | None]":
    """Opens both; the task may take its tokenizer from the model's folder."""
    from tersor.sources import open_model, open_task

    skeleton = open_model(like) if like else None
    source = open_model(model, like=copy.deepcopy(skeleton.model) if skeleton else None)
    folder = source.folder or (skeleton.folder if skeleton else None)
    return source, open_task(data, tokenizer=folder) if data else None
