"""What a teacher said, kept on disk: each row of inputs is asked about once.

Files are safetensors, so what is read from them can run nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.files import atomic
from tersor.task import Inputs, Task, device_of
from tersor.task.data import add_to, apply, rows_in, tensors_of

MOST_BYTES = 2**30
"""Of all files in a folder. One gibibyte holds 25 million rows of ten classes, and few of a large
vocabulary."""
_FILES = "*.safetensors"
_DIGEST = 16
_EPOCHS = 2
"""Without a row that comes back, after which none is looked for: a loader varies its inputs."""


class Memory:
    """Answers of one network to the inputs of one task, in a folder.

    They are those of the batch in which a row came first; in another one they may differ in their
    last digits.
    """

    def __init__(
        self, folder: Path, network: nn.Module, task: Task, *, most_bytes: int = MOST_BYTES
    ) -> None:
        """Reads which rows are known. Files that are damaged count as not there.

        most_bytes: of all files in the folder; where they are too many, those of other networks go
            first, the oldest before the others, and then nothing more is kept
        """
        self._folder, self._most = folder, most_bytes
        self._name = fingerprint(network, task)
        self._device = device_of(network).type
        self._unit = task.rows_per_sample
        # One answer to a whole text does not depend on how far it was padded at its end.
        self._whole = task.kind != "language"
        self._known: dict[bytes, tuple[Path, int]] = {}
        # Mapped into memory once, since an epoch in another order reads from all of them.
        self._opened: dict[Path, Any] = {}
        self._epochs = self._found = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            self._most = 0
        self._bytes = sum(path.stat().st_size for path in folder.glob(_FILES))
        for path in sorted(folder.glob(f"{self._name}-{_FILES}")):
            for place, digest in enumerate(_digests_in(path)):
                self._known[digest] = path, place

    def begin(self) -> None:
        """Another epoch starts."""
        self._epochs += 1

    def answered(self, inputs: Inputs, ask: Callable[[Inputs], Tensor]) -> Tensor:
        """The rows of `task.predict` for `inputs`. ask: what gives them for rows that are new"""
        if self._epochs > _EPOCHS and not self._found:
            return ask(inputs)
        digests = _digests(inputs, self._unit, self._device, self._whole)
        new = [place for place, digest in enumerate(digests) if digest not in self._known]
        self._found += len(digests) - len(new)
        if len(new) == len(digests):
            asked = ask(inputs)
            self._keep(digests, asked)
            return asked
        answers: list[Tensor | None] = self._read(digests)
        if new:
            rows = torch.tensor([self._unit * n + k for n in new for k in range(self._unit)])
            asked = ask(apply(lambda tensor: tensor[rows.to(tensor.device)], inputs))
            self._keep([digests[place] for place in new], asked)
            for place, part in zip(new, _parts(asked, len(new)), strict=True):
                answers[place] = part
        device = next(iter(tensors_of(inputs).values())).device
        return torch.cat([part.to(device) for part in answers if part is not None])

    def _read(self, digests: Sequence[bytes]) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(digests)
        for at, digest in enumerate(digests):
            if digest in self._known:
                path, place = self._known[digest]
                if path not in self._opened:
                    opened: Any = safe_open(path, framework="pt")
                    self._opened[path] = opened.get_slice("answers")
                found[at] = self._opened[path][place : place + 1][0]
        return found

    def _keep(self, digests: Sequence[bytes], answers: Tensor) -> None:
        """One more file, where there is room."""
        size = answers.numel() * answers.element_size() + _DIGEST * len(digests)
        if not self._room(size):
            return
        name = hashlib.sha256(b"".join(digests)).hexdigest()[: 2 * _DIGEST]
        path = self._folder / f"{self._name}-{name}.safetensors"
        tensors = {
            "rows": torch.tensor([list(digest) for digest in digests], dtype=torch.uint8),
            "answers": torch.stack(_parts(answers.detach().cpu(), len(digests))).contiguous(),
        }
        try:
            with atomic(path) as draft:
                save_file(tensors, draft)
        except (OSError, SafetensorError):
            # What cannot be kept is asked for again; training goes on.
            self._most = 0
            return
        self._bytes += path.stat().st_size
        self._known |= {digest: (path, place) for place, digest in enumerate(digests)}

    def _room(self, size: int) -> bool:
        """Whether so many bytes fit, once answers of other networks are gone."""
        if not self._most:  # The folder cannot be written.
            return False
        if self._bytes + size > self._most:
            others = [p for p in self._folder.glob(_FILES) if not p.name.startswith(self._name)]
            for oldest in sorted(others, key=lambda path: path.stat().st_mtime):
                if self._bytes + size > self._most:
                    self._bytes -= oldest.stat().st_size
                    oldest.unlink()
        return self._bytes + size <= self._most


def fingerprint(network: nn.Module, task: Task) -> str:
    """Of a network, and of a task."""
    digest = hashlib.sha256(f"{hash_of(network)} {task.fingerprint()}".encode())
    return digest.hexdigest()[: 2 * _DIGEST]


def hash_of(network: nn.Module) -> str:
    """Of a network's weights, or of the file that it runs."""
    digest = hashlib.sha256(type(network).__qualname__.encode())
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in tensors.items():
        add_to(digest, name, tensor)
    path = getattr(network, "path", None)
    if not tensors and isinstance(path, Path):
        # Weights may lie beside it, as those of large ONNX files and of OpenVINO's do.
        beside = path.with_suffix(".bin") if path.suffix == ".xml" else f"{path}.data"
        for file in (path, Path(beside)):
            if file.exists():
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[: 2 * _DIGEST]


def _digests(inputs: Inputs, unit: int, device: str, whole: bool) -> list[bytes]:
    """Of each `unit` rows of inputs: their shapes and types, and the precision of products there.

    device: its type
    whole: leave out tokens behind the last that an attention_mask lets in
    """
    parts = {name: tensor.detach().cpu() for name, tensor in tensors_of(inputs).items()}
    mask = parts.get("attention_mask") if whole else None
    # Answers in few bits are other answers.
    half = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
    found = []
    for start in range(0, rows_in(inputs), unit):
        digest, rows = hashlib.sha256(half.encode()), slice(start, start + unit)
        for name, tensor in parts.items():
            part = tensor[rows]
            if mask is not None and mask.dim() == 2 and tensor.shape == mask.shape:
                # Not what is left out before it, which moves positions.
                used = (mask[rows] != 0).any(0).nonzero()
                part = part[:, : int(used.max()) + 1 if len(used) else 0]
            add_to(digest, name, part)
        found.append(digest.digest()[:_DIGEST])
    return found


def _digests_in(path: Path) -> list[bytes]:
    try:
        with safe_open(path, framework="pt") as file:
            rows, kept = file.get_tensor("rows"), file.get_slice("answers").get_shape()
    except (SafetensorError, OSError):
        return []
    if rows.dtype != torch.uint8 or rows.dim() != 2 or kept[0] != len(rows):
        return []
    return [bytes(row) for row in rows.tolist()]


def _parts(answers: Tensor, count: int) -> list[Tensor]:
    """Rows of answers, as many for each of `count` inputs."""
    return list(answers.reshape(count, -1, *answers.shape[1:]))
