"""Makes trained networks small, and proves on the written file that they still do their job."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tersor.version import VERSION

if TYPE_CHECKING:
    # The same names as below, for type checkers and editors.
    from tersor import checkpoints as checkpoints
    from tersor import codec as codec
    from tersor import errors as errors
    from tersor import export as export
    from tersor import federated as federated
    from tersor import forms as forms
    from tersor import measure as measure
    from tersor import methods as methods
    from tersor import plan as plan
    from tersor import report as report
    from tersor import surgery as surgery
    from tersor import task as task
    from tersor import train as train
    from tersor.checkpoints import pack as pack
    from tersor.checkpoints import quantize_folder as quantize_folder
    from tersor.checkpoints import unpack as unpack
    from tersor.codec import load as load
    from tersor.codec import save as save
    from tersor.measure import compare as compare
    from tersor.methods import replay as replay
    from tersor.methods import run as run
    from tersor.plan import Budget as Budget
    from tersor.plan import compress as compress
    from tersor.surgery import decoded as decoded
    from tersor.task import Task as Task

__version__ = VERSION

# Public names and where they live, imported on first use: `import tersor` stays as quick as torch.
_HOMES = {
    "Budget": "tersor.plan",
    "Task": "tersor.task",
    "compare": "tersor.measure",
    "compress": "tersor.plan",
    "decoded": "tersor.surgery",
    "load": "tersor.codec",
    "pack": "tersor.checkpoints",
    "quantize_folder": "tersor.checkpoints",
    "replay": "tersor.methods",
    "run": "tersor.methods",
    "save": "tersor.codec",
    "unpack": "tersor.checkpoints",
}
# Rooms that open on first use: `tersor.task.classification(...)` needs no import of its own.
_ROOMS = (
    *(
        "checkpoints",
        "codec",
        "errors",
        "export",
        "federated",
        "forms",
        "measure",
        "methods",
        "plan",
        "report",
        "surgery",
        "task",
    ),
    "train",
)

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"tersor.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tersor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})
