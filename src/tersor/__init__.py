"""tersor makes trained networks small, and proves on the written file that they still do their job."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tersor.version import VERSION as __version__

# Public names and where they live, imported on first use: `import tersor` stays as quick as torch.
_HOMES = {
    "Budget": "tersor.plan",
    "Task": "tersor.task",
    "compare": "tersor.measure",
    "compress": "tersor.plan",
    "decoded": "tersor.surgery",
    "load": "tersor.codec",
    "replay": "tersor.methods",
    "run": "tersor.methods",
    "save": "tersor.codec",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
