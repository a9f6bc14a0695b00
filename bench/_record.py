"""Writes what a benchmark measured, with what it takes to measure it again."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def record(name: str, figures: dict[str, Any], *, packages: tuple[str, ...] = ()) -> Path:
    """Writes `figures` to bench/results/<name>.json beside the command, versions and threads.

    packages: what else than torch and tersor the figures depend on
    """
    script = Path(sys.argv[0]).resolve()
    content = {
        "command": " ".join(["python", f"{script.parent.name}/{script.name}", *_arguments()]),
        "versions": {
            "python": platform.python_version(),
            **_versions("torch", "tersor", *packages),
        },
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}),
        },
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _arguments() -> list[str]:
    """Without the places of this machine."""
    given = sys.argv[1:]
    return [Path(each).name if Path(each).is_absolute() else each for each in given]


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.machine()
