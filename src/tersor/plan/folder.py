"""The folder of a run: the job, its journal, and the finished file and report.

A job is what determines the result: model, task, budget, recipe, seed. A folder belongs to one job;
running the same job in it again resumes, another job is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tersor.errors import OptionError, OutputError
from tersor.files import drafts, write_text
from tersor.plan.journal import Journal


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def model(self) -> Path:
        """The compressed model."""
        return self.path / "model.tersor"

    @property
    def job(self) -> Path:
        """What was asked."""
        return self.path / "job.yaml"

    def trial(self, name: str) -> Path:
        """A file that was tried; removed when the run is finished."""
        return self.path / f"trial-{name}.tersor"

    def tidy(self) -> None:
        """Removes trials, and what a killed run may have left half-written."""
        for leftover in (*self.path.glob("trial-*.tersor"), *drafts(self.path)):
            leftover.unlink(missing_ok=True)


def open_folder(path: str | Path, job: dict[str, Any]) -> tuple[RunFolder, Journal]:
    """Creates the folder, or reopens it for the same job.

    Raises OutputError where it cannot be written, OptionError where it belongs to another job.
    """
    folder = RunFolder(Path(path))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the run folder {folder.path} cannot be made: {error.strerror}; choose another with "
            "run= or --out"
        ) from error
    if folder.job.exists():
        _check_same(folder, job)
    elif {*folder.path.iterdir()} - {*drafts(folder.path)}:
        raise OptionError(
            f"the folder {folder.path} holds other files and no run; choose an empty or new one"
        )
    else:
        write_text(folder.job, yaml.safe_dump(job, sort_keys=True))
    return folder, Journal(folder.path / "journal.sqlite")


def _check_same(folder: RunFolder, job: dict[str, Any]) -> None:
    try:
        found = yaml.safe_load(folder.job.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{folder.job} cannot be read as the job of a run: {error}; choose another folder"
        ) from error
    if found != job:
        differs = sorted(
            k
            for k in {*job, *(found if isinstance(found, dict) else {})}
            if not isinstance(found, dict) or found.get(k) != job.get(k)
        )
        raise OptionError(
            f"the folder {folder.path} belongs to another run ({', '.join(differs)} differ); "
            "nothing in it was changed: choose another folder"
        )
