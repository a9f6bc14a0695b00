"""Writing a file in one piece or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tersor.errors import OutputError


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty file beside `path`; it becomes `path` when the block ends well.

    However the block is left otherwise, what was at `path` is still there and nothing else is.
    Raises OutputError, with the reason, where the folder cannot be written or the disk is full.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target} is a folder; give the path of a file in it")
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        draft.touch(exist_ok=False)
        yield draft
        _on_disk(draft)
        draft.replace(target)
        with suppress(OSError):
            _on_disk(target.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{target} cannot be written: {error.strerror or error}; what was there before is "
            "untouched. Choose a folder that exists, is writable and has room"
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def drafts(folder: Path, pattern: str = "*") -> list[Path]:
    """What `atomic` left in a folder because the program was killed in the middle.

    pattern: of the names that they were to have
    """
    return sorted(folder.glob(f".{pattern}.*.part"))


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes UTF-8 text, whole or not at all. Raises OutputError."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return Path(path)


def _on_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
