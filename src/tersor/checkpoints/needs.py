"""What quantizing a folder takes of memory and disk, known before it starts."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor.errors import OptionError, OutputError

GB = 10**9
_FIXED = GB
"""Python, torch and transformers, and the elements that are looked at together."""
_WEIGHTS, _MOMENTS = 8, 3
"""Copies of the largest weight, and squares of its inputs, while its codes are chosen."""


@dataclass(frozen=True)
class Needs:
    """Bytes, but for `blocks` and `tokens`.

    block: the largest block, in float32
    memory: most that the program will hold at any time
    work: on the disk of the work folder; out: on that of the finished file
    """

    blocks: int
    tokens: int
    block: int
    memory: int
    work: int
    out: int

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """A sentence."""
        return (
            f"{self.blocks} blocks, the largest of {_gb(self.block)} in float32; needs at most "
            f"{_gb(self.memory)} of memory, {_gb(self.work)} of disk while it works and "
            f"{_gb(self.out)} for the file"
        )


def needs_of(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    tokens: int,
    *,
    solved: bool,
    symmetric: bool,
    bits: float,
    file_bytes: int,
) -> Needs:
    """What quantizing `model`, which has no values, takes.

    tokens: of calibration data; solved: whether codes are chosen by what weights are given
    symmetric: whether codes have no zero points, from which they would be counted in the file
    bits: that a weight takes in the file, about; file_bytes: of the checkpoint
    """
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    inside = [p for block in blocks for p in block.parameters()]
    matrices = [p for p in inside if p.dim() > 1]
    widest = max((p.shape[-1] for p in matrices), default=0)
    width = max(map(_normalized, blocks)) or widest
    memory = _FIXED + 2 * 4 * max(sizes)
    if solved:
        largest = max((p.numel() for p in matrices), default=0)
        memory += 4 * (_WEIGHTS * largest + _MOMENTS * widest**2)
        memory += 4 * tokens * (widest + 3 * width)
    weights = sum(p.numel() for p in model.parameters())
    if not symmetric:
        # All of these differences are in memory before the first is written.
        memory = max(memory, _FIXED + 2 * weights)
    # A byte for each code, and scales.
    work = round(1.1 * weights) + 2 * 4 * tokens * width
    # The chunks wait in a file of their own until the header is known.
    out = 2 * min(file_bytes, round(1.1 * bits / 8 * weights))
    return Needs(len(sizes), tokens, 4 * max(sizes), memory, work, out)


def _normalized(block: nn.Module) -> int:
    """The width of its norms, the layers that own vectors alone: that of what they are given.

    Norms of the heads are narrower, and biases of linear layers may be wider.
    """
    vectors = [[*layer.parameters(recurse=False)] for layer in block.modules()]
    return max(
        (p.numel() for own in vectors if {q.dim() for q in own} == {1} for p in own), default=0
    )


def check_room(needs: Needs, work: Path, out: Path, memory: float | None, done: int) -> None:
    """Raises OptionError or OutputError, with what is there, where it does not suffice.

    memory: bytes that may be used at most; done: bytes of the work that are on disk already
    """
    have = min(_memory(), memory if memory is not None else float("inf"))
    if needs.memory > have:
        raise OptionError(
            f"the largest block of {_gb(needs.block)} and {needs.tokens} tokens need up to "
            f"{_gb(needs.memory)} of memory, and there are {_gb(have)}; end other programs, give "
            "fewer tokens, or use a machine with more memory"
        )
    wanted: dict[int, tuple[Path, int]] = {}
    for folder, size in ((_there(work), max(0, needs.work - done)), (_there(out), needs.out)):
        device = os.stat(folder).st_dev
        wanted[device] = folder, size + wanted.get(device, (folder, 0))[1]
    for folder, size in wanted.values():
        free = os.statvfs(folder)
        if size > free.f_bavail * free.f_frsize:
            raise OutputError(
                f"{folder} needs {_gb(size)} of free disk and has "
                f"{_gb(free.f_bavail * free.f_frsize)}; choose another place with work= or out="
            )


def _there(path: Path) -> Path:
    """The folder that it is in, or is to be made in."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _memory() -> float:
    """Bytes that this program may still use, with those it has: of the machine, and by limits."""
    own = _field("/proc/self/status", "VmRSS")
    found = [own + _field("/proc/meminfo", "MemAvailable")] if own else []
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_RSS):
        soft = resource.getrlimit(limit)[0]
        found += [soft] if soft != resource.RLIM_INFINITY else []
    return min(found, default=float("inf"))


def _field(path: str, name: str) -> int:
    """A line such as "MemAvailable: 1024 kB" in bytes; 0 where the system has no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB"
