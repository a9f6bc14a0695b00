"""The journal of a run: every finished measurement, on disk the moment it is finished.

A key is a hash of all that a measurement depends on, so that no entry is stale: another model (also
one whose code was changed), other data, other options or another version of tersor have other keys.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tersor.errors import OutputError
from tersor.task.data import add_to
from tersor.version import VERSION

_MODES = ("training", "_is_full_backward_hook")


class Journal:
    """A content-hashed cache of measurements in one sqlite file; survives kill -9."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. Raises OutputError when that is not possible."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS measurements (key TEXT PRIMARY KEY, what TEXT, value "
                "TEXT)"
            )
        except sqlite3.Error as error:
            raise OutputError(
                f"{path} cannot be used as the journal of a run: {error}; free space, or choose "
                "another folder"
            ) from error

    def recall(self, what: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """The value noted for `what`, or `measure()`, noted before it is returned.

        what: plain JSON values that determine the measurement
        measure: returns plain JSON values
        """
        text = json.dumps({"tersor": VERSION, "torch": torch.__version__, **what}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        found = self._execute("SELECT value FROM measurements WHERE key = ?", key)
        if found:
            return json.loads(found[0][0])
        value = json.dumps(measure())
        self._execute("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)", key, text, value)
        # Read back through JSON, so that a resumed run sees exactly what an uninterrupted one saw.
        return json.loads(value)

    def _execute(self, statement: str, *values: str) -> list[Any]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise OutputError(
                f"the journal of the run cannot be used: {error}; free space and run again, "
                "finished measurements are kept, or choose another folder if it is damaged"
            ) from error

    def close(self) -> None:
        """Closes the file."""
        self._db.close()


def is_empty(path: Path) -> bool:
    """True where a journal notes nothing yet."""
    journal = Journal(path)
    try:
        return not journal._execute("SELECT key FROM measurements LIMIT 1")
    finally:
        journal.close()


def model_hash(model: nn.Module) -> str:
    """SHA-256 over the model's structure, its classes' source, their settings, and every tensor."""
    # A function's address in a repr would make every process see another model.
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    digest = hashlib.sha256(structure.encode())
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        if not kind.__module__.startswith("torch."):
            digest.update(_source(kind).encode())
    for name, module in model.named_modules():
        # What __init__ was told, as a scale that forward uses; modes are none of it.
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and key not in _MODES
        }
        digest.update(repr((name, sorted(plain.items()))).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        add_to(digest, name, tensor)
    return digest.hexdigest()


def example_hash(example: Any) -> str | None:
    """SHA-256 over inputs of any structure; None for none."""
    if example is None:
        return None
    tree = dict(example) if isinstance(example, Mapping) else example
    leaves, structure = pytree.tree_flatten(tree)
    digest = hashlib.sha256(str(structure).encode())
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            add_to(digest, str(place), leaf)
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _source(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind)
    # Typed into an interpreter, or compiled without its source.
    except (OSError, TypeError):
        return kind.__qualname__
