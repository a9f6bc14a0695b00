"""The report as JSON: how every program reads it, and how it is read back from a run's folder."""

import json
import os
from pathlib import Path
from typing import Any

from tersor.errors import FileError
from tersor.measure.figures import plain

Data = dict[str, Any]

LARGEST = 64_000_000


def as_json(report: Data) -> str:
    """The report as text. Infinities become null, which JSON has a word for."""
    return json.dumps(plain(report), indent=1, ensure_ascii=False)


def read(path: str | os.PathLike[str]) -> Data:
    """Reads report.json, or the one in a run's folder. Raises FileError for anything else."""
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    way_out = "name the folder of a finished run, or run `tersor compress` again to finish it"
    try:
        if path.stat().st_size > LARGEST:
            raise FileError(
                f"{path} has more than {LARGEST:,} bytes, too many for a report; {way_out}"
            )
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}; {way_out}") from error
    except ValueError as error:
        raise FileError(f"{path} is not JSON: {error}; {way_out}") from error
    if not isinstance(report, dict) or not {"model", "before", "after"} <= report.keys():
        raise FileError(f"{path} is not a report of tersor; {way_out}")
    return report
