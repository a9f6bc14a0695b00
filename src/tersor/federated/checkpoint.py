"""A federation on disk: what goes on where the server was killed, as tensors and JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.federated.server import Server
from tersor.train import checkpoint

_NAME = "federation.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The file of one federation.

    settings: texts and numbers that must be the same to go on
    """

    folder: Path
    settings: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.folder / _NAME

    def store(
        self, server: Server, generator: torch.Generator, rounds: Sequence[Mapping[str, Any]]
    ) -> None:
        """Between two rounds, whole or not at all. Raises OutputError where it cannot be written.

        rounds: what is to be said of each that is done
        """
        content = {
            "settings": dict(self.settings),
            "server": server.store(),
            "drawn": generator.get_state(),
            "rounds": list(rounds),
        }
        checkpoint.store(self.path, {"federation": content, "digest": _digest(content)})

    def restore(self, server: Server, generator: torch.Generator) -> list[dict[str, Any]]:
        """The inverse: gives the rounds; none where there is no file yet.

        Raises OptionError for a file that is damaged, or of another federation.
        """
        found = checkpoint.read(self.path)
        if found is None:
            return []
        try:
            content = found["federation"]
            if _digest(content) != found["digest"]:
                raise ValueError("its digest is another")
            _check_settings(content["settings"], self.settings)
            rounds: list[dict[str, Any]] = content["rounds"]
            server.restore(content["server"])
            generator.set_state(content["drawn"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"{self.path} cannot be gone on from: {error}; delete it to start anew, or name "
                "another folder"
            ) from error
        return rounds


def _digest(content: object) -> str:
    """Of numbers and texts as JSON, and of each tensor's bytes: safetensors has no checksum."""
    text = json.dumps(content, default=_digest_of_tensor)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest_of_tensor(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.numpy().tobytes(), digest_size=16).hexdigest()


def _check_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(f"it is of a federation with {name}={found[name]}, not {value}")
