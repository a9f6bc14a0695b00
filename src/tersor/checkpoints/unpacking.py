"""Writes a .tersor file as the safetensors checkpoint that it was, weights decoded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tersor.checkpoints.layout import Layout, layouts
from tersor.checkpoints.quantizing import decoded_pieces
from tersor.checkpoints.writing import Writer, usual_order, writing
from tersor.codec import check_apart, read_header, stream
from tersor.errors import FileError, OutputError
from tersor.files import write_text
from tersor.forms import Form


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` wrote. decoded: how many of the tensors were quantized"""

    paths: list[Path]
    bytes_before: int
    bytes_after: int
    tensors: int
    decoded: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self) | {"paths": [str(path) for path in self.paths]}


def unpack(path: str | Path, out: str | Path, *, base: str | Path | None = None) -> Unpacked:
    """Writes the tensors of a .tersor file as safetensors: names, shapes, types and metadata kept.

    What `pack` kept bit for bit comes back so, in the same place of the file. Any .tersor file can
    be given; a network's has its weights decoded, tied ones under each of their names.

    out: the file to write; for a checkpoint of several files a folder, in which they and their
        index are written, or a name that ends in .safetensors, for one file with everything
    base: the file that it was packed with as its base, where there was one

    Raises FileError for a file that is damaged, OutputError where a file cannot be written.
    """
    started = time.monotonic()
    path, out = Path(path), Path(out)
    header = read_header(path)
    try:
        files, index = layouts(header)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    if index and out.suffix == ".safetensors":
        files, index = [_together(files)], {}
    paths = [out / str(layout.file) if index else out for layout in files]
    for place in (out, *paths):
        check_apart(place, [path, base], f"{place} is what is unpacked")
    with _folder(out) if index else nullcontext():
        decoded = _write(path, base, list(zip(paths, files, strict=True)))
        if index:
            paths.append(_write_index(out, files, index))
    return Unpacked(
        paths=paths,
        bytes_before=header.file_bytes,
        bytes_after=sum(written.stat().st_size for written in paths),
        tensors=sum(len(layout.slots) for layout in files),
        decoded=decoded,
        seconds=time.monotonic() - started,
    )


def _write(path: Path, base: str | Path | None, places: list[tuple[Path, Layout]]) -> int:
    """Writes all files, and returns how many of the tensors were decoded from forms."""
    decoded = 0
    with ExitStack() as stack:
        writers: dict[str, tuple[Writer, str]] = {}
        for place, layout in places:
            writer = stack.enter_context(writing(place, layout.slots, layout.metadata))
            for name, slot in zip(layout.names, layout.slots, strict=True):
                writers[name] = writer, slot.name
        for entry, item in stream(path, base=base):
            decoded += isinstance(item, Form)
            for name in entry.names:
                writer, own = writers[name]
                writer.put(own, decoded_pieces(item))
        # A full disk has to show before the first file takes its name.
        for writer, _ in writers.values():
            writer.flush()
    return decoded


def _together(files: list[Layout]) -> Layout:
    """All files as one."""
    named = {slot.name: name for f in files for slot, name in zip(f.slots, f.names, strict=True)}
    slots = usual_order([slot for layout in files for slot in layout.slots])
    metadata = {key: value for layout in files for key, value in layout.metadata.items()}
    return Layout(None, slots, [named[slot.name] for slot in slots], metadata)


def _write_index(folder: Path, files: list[Layout], index: dict[str, Any]) -> Path:
    placed = {slot.name: layout.file for layout in files for slot in layout.slots}
    content = {"metadata": index["metadata"], "weight_map": dict(sorted(placed.items()))}
    return write_text(folder / index["file"], json.dumps(content, indent=2) + "\n")


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """A folder that was made for files is gone again if they could not be written."""
    there = folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made: {error.strerror or error}; name a folder, or a file that "
            "ends in .safetensors for everything in one"
        ) from error
    try:
        yield
    except BaseException:
        if not there:
            with suppress(OSError):
                folder.rmdir()
        raise
