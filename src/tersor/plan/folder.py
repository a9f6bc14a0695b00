"""The folder of a run: the job, its journal, and the finished file and report.

A job is what determines the result: model, task, budget, recipe, seed. Running the same job in the
folder again resumes. A folder with a finished file belongs to its job, and another one is refused.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tersor.errors import CompressError, OptionError, OutputError
from tersor.files import drafts, write_text
from tersor.plan.journal import Journal, is_empty

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


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

    def training(self, name: str) -> Path:
        """Where trainings of a recipe keep themselves; removed when the run has its file."""
        return self.path / "training" / name

    def forget_trainings(self) -> None:
        """Behind a run that has its file and its report."""
        shutil.rmtree(self.path / "training", ignore_errors=True)

    def tidy(self) -> None:
        """Removes trials, and what a killed run may have left half-written."""
        for leftover in (*self.path.glob("trial-*.tersor"), *drafts(self.path)):
            leftover.unlink(missing_ok=True)


@contextmanager
def run_folder(path: str | Path, job: dict[str, Any]) -> Iterator[tuple[RunFolder, Journal]]:
    """The folder, made or reopened for this job, and its journal; for one process at a time.

    A job that failed before anything was measured leaves no new folder behind. Raises OutputError
    where it cannot be written, OptionError where it holds the file of another job, or other files.
    """
    folder = RunFolder(Path(path))
    is_new = not folder.path.exists()
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the run folder {folder.path} cannot be made: {error.strerror}; choose another with "
            "run= or --out"
        ) from error
    with _alone(folder.path):
        try:
            with _journal(folder, job) as journal:
                yield folder, journal
        except BaseException as error:
            if isinstance(error, CompressError):
                folder.tidy()
            if is_new:
                _remove_empty(folder)
            raise


@contextmanager
def _journal(folder: RunFolder, job: dict[str, Any]) -> Iterator[Journal]:
    if folder.job.exists():
        _check_same(folder, job)
    elif {*folder.path.iterdir()} - {*drafts(folder.path)}:
        raise OptionError(
            f"the folder {folder.path} holds other files and no run; choose an empty or new one"
        )
    asked = yaml.safe_dump(job, sort_keys=True)
    if not folder.job.exists() or folder.job.read_bytes() != asked.encode():
        write_text(folder.job, asked)
    journal = Journal(folder.path / "journal.sqlite")
    try:
        yield journal
    finally:
        journal.close()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps a second run out while the block lasts; the system lets go of it after a kill, too."""
    if fcntl is None:
        yield
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"the run folder {path} cannot be read: {error.strerror}; choose another with run= or "
            "--out"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise OptionError(
            f"another run is at work in the folder {path}; wait for its end, or choose another "
            "folder"
        ) from None
    except OSError:
        # Some network file systems know no locks.
        pass
    try:
        yield
    finally:
        os.close(handle)


def _remove_empty(folder: RunFolder) -> None:
    """Removes a folder in which nothing was measured yet, so that any job can have its name."""
    journal = folder.path / "journal.sqlite"
    with suppress(OSError, OutputError):
        if not journal.exists() or is_empty(journal):
            for leftover in (folder.job, *folder.path.glob("journal.sqlite*")):
                leftover.unlink(missing_ok=True)
            folder.path.rmdir()


def _check_same(folder: RunFolder, job: dict[str, Any]) -> None:
    """Raises OptionError for the folder of another job that has left its file.

    Before that there are measurements alone, which no other job can mistake for its own.
    """
    if not folder.model.exists():
        return
    try:
        found = yaml.safe_load(folder.job.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{folder.job} cannot be read as the job of a run: {error}; choose another folder"
        ) from error
    old = found if isinstance(found, dict) else {}
    differs = sorted(key for key in {*job, *old} if old.get(key) != job.get(key))
    if differs:
        raise OptionError(
            f"the folder {folder.path} belongs to a run with another {' and '.join(differs)}; "
            "nothing in it was changed: choose another folder"
        )
