"""Writes an ONNX file beside its place and moves it there when it has proved itself."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tersor.errors import OutputError

SINGLE_FILE_LIMIT = 2**31 - 2**20
"""Protobuf refuses more; above it the initializers go to `<name>.data` beside the file."""


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside `path`; its files move to `path` at the end.

    Nothing is moved when the block raises.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name the file to write")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            yield Path(folder) / path.name
            # The data first: a model without its data would be broken, data alone is harmless.
            for written in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(written, path.parent / written.name)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that exists, is "
            "writable and has room"
        ) from error


def save(model: Any, path: Path) -> int:
    """Writes an onnx_ir model and returns its size in bytes, all files together."""
    import onnx_ir

    tensors = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) > SINGLE_FILE_LIMIT:
        onnx_ir.save(model, path, external_data=f"{path.name}.data")
    else:
        proto = onnx_ir.to_proto(model)
        # The shapes of initializers, which they have themselves.
        del proto.graph.value_info[:]
        path.write_bytes(proto.SerializeToString(deterministic=True))
    return sum(file.stat().st_size for file in path.parent.iterdir())
