"""Trainings on disk, as tensors and JSON: what is read from such a file can run nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersor.errors import OptionError, OutputError
from tersor.files import atomic

_VERSION = 1


def store(path: Path, state: dict[str, Any]) -> None:
    """Writes mappings and lists of tensors, numbers, texts and None, whole or not at all.

    Raises OutputError where the folder cannot be written or the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.dumps({"version": _VERSION, "state": _taken_apart(state, tensors)})
    _write(path, tensors, {"tersor.training": plain})


def store_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by their names, whole or not at all. Raises OutputError as `store` does."""
    _write(path, {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()})


def _write(path: Path, tensors: dict[str, Tensor], more: dict[str, str] | None = None) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as draft:
            save_file(tensors, draft, metadata=more)
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{path} cannot be written: {error}; choose a folder that is writable and has room"
        ) from error


def read(path: Path) -> dict[str, Any] | None:
    """What `store` wrote; None where there is nothing. Raises OptionError for another file."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            plain = json.loads((file.metadata() or {})["tersor.training"])
            if plain["version"] != _VERSION:
                raise KeyError(f"version {plain['version']}")
            found = _together(plain["state"], file.get_tensor)
            if not isinstance(found, dict):
                raise TypeError("it holds no state")
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RecursionError) as error:
        raise OptionError(
            f"{path} holds no training of this tersor ({error}); delete it to start anew, or name "
            "another folder"
        ) from error
    return found


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy, since two of them may lie in one storage.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        # Pairs, for JSON knows no numbers as keys.
        return {"pairs": [[key, _taken_apart(v, tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_taken_apart(v, tensors) for v in value]
    return value


def _together(value: Any, tensor: Any) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensor(value["tensor"])
        return {key: _together(v, tensor) for key, v in value["pairs"]}
    if isinstance(value, list):
        return [_together(v, tensor) for v in value]
    return value
