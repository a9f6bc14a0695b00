"""The folder of a run of `quantize_folder`: what it is about, and what is finished of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tersor.checkpoints.source import Checkpoint
from tersor.checkpoints.weights import Weights
from tersor.errors import OptionError, OutputError
from tersor.files import drafts, write_text
from tersor.version import VERSION

_NOTE = "job.json"
_FILES = ("block-*.safetensors", "states-*.safetensors", "end-*.safetensors", _NOTE)
"""In the order in which they are removed: killed then, a run begins anew with the first blocks."""


@dataclass(frozen=True)
class Job:
    """What is to be done.

    model: the skeleton; path: of its blocks
    chosen: names of the weights to quantize, of each block
    tokens: (sequences, length), None without calibration data
    """

    folder: Path
    model: nn.Module
    path: str
    blocks: Sequence[nn.Module]
    weights: Weights
    method: str
    options: dict[str, Any]
    chosen: Sequence[list[str]]
    tokens: Tensor | None

    def block_path(self, at: int) -> str:
        """ "model.layers.3" """
        return f"{self.path}.{at}"

    def part(self, at: int) -> Path:
        """The forms of a block."""
        return self.folder / f"block-{at:05}.safetensors"

    def states(self, at: int) -> Path:
        """What a block is given."""
        return self.folder / f"states-{at:05}.safetensors"

    def end(self, at: int) -> Path:
        """The form of a weight that lies outside of the blocks."""
        return self.folder / f"end-{at:05}.safetensors"

    @property
    def bytes_done(self) -> int:
        """Of all that is finished."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def clear(self) -> None:
        """Removes what the run has written, and the folder if nothing else is in it."""
        for pattern in _FILES:
            for path in sorted(self.folder.glob(pattern)):
                path.unlink()
        self.clear_drafts()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def clear_drafts(self) -> None:
        """Removes what was being written when the run was killed."""
        for pattern in _FILES:
            for draft in drafts(self.folder, pattern):
                draft.unlink()


def about(job: Job, checkpoint: Checkpoint, ends: int | None) -> dict[str, Any]:
    """What a run depends on, as plain values."""
    tokens = job.tokens
    files = [
        [shard.path.name, shard.path.stat().st_size, shard.path.stat().st_mtime_ns]
        for shard in checkpoint.shards
    ]
    heads = _sha256(b"".join(shard.head for shard in checkpoint.shards))
    network = f"{job.model!r} {getattr(job.model, 'config', None)!r}"
    data = None if tokens is None else _sha256(tokens.numpy().tobytes())
    return {
        "tersor": VERSION,
        "method": job.method,
        "options": job.options,
        "ends": ends,
        "calibration": [data, None if tokens is None else list(tokens.shape)],
        "files": files,
        "headers": heads,
        # Without the addresses of objects, which differ in each process.
        "network": _sha256(re.sub(" at 0x[0-9a-f]+", "", network).encode()),
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def known(folder: Path, what: dict[str, Any]) -> bool:
    """Whether a work folder is one in which `what` was begun. Raises OptionError for another."""
    note = folder / _NOTE
    try:
        found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    except (OSError, ValueError) as error:
        raise OutputError(f"{note} cannot be read: {error}; name another work folder") from None
    if found is None and any(folder.glob("block-*.safetensors")):
        raise OptionError(f"work={folder} holds parts of an unknown run; name another folder")
    if found is not None and found != json.loads(json.dumps(what)):
        other = sorted(k for k in what if not isinstance(found, dict) or found.get(k) != what[k])
        raise OptionError(
            f"work={folder} belongs to another run, with other {' and '.join(other)}; name another "
            "folder, or remove that one to start again"
        )
    return found is not None


def begin(folder: Path, what: dict[str, Any]) -> None:
    """Makes a work folder, and notes what it is about."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the work folder {folder} cannot be made: {error.strerror or error}; name another"
        ) from error
    try:
        write_text(folder / _NOTE, json.dumps(what, indent=1) + "\n")
    except OutputError:
        # Only if nothing else is in it.
        with suppress(OSError):
            folder.rmdir()
        raise
