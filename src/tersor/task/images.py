"""Tasks on pictures: arrays of pixels, and folders of image files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tersor.errors import MissingExtra, OptionError, TaskError
from tersor.task.data import Batch, Rows, as_tensor, check_count, finite, given
from tersor.task.files import File, existing
from tersor.task.makers import classification_of, labels_of
from tersor.task.task import Task

Layout: TypeAlias = Literal["NCHW", "NHWC", "NHW"]
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# What a folder's parts are called, by the split they become.
FOLDERS = {
    "test": ("test", "val", "valid", "validation"),
    "train": ("train", "training"),
    "calibration": ("calibration",),
    "holdout": ("holdout",),
}


def image_classification(
    test: Any = None,
    train: Any = None,
    calibration: Any = None,
    holdout: Any = None,
    *,
    layout: Layout,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 100,
) -> Task:
    """A task of telling the classes of pictures apart.

    Each split: (pixels, labels); calibration and holdout may be pixels alone. Pixels of whole
    numbers 0..255 become 0..1, floats stay as they are; the model gets (n, channels, height,
    width). They are kept as given and converted batch by batch.

    layout: the order of the axes given: "NCHW", "NHWC", or "NHW" for one channel
    mean, std: per channel; the model gets (pixels - mean) / std
    """
    if layout not in ("NCHW", "NHWC", "NHW"):
        raise OptionError(f'layout={layout!r} must be "NCHW", "NHWC" or "NHW"')
    check_count(batch_size, "batch_size")
    constants = _constants(mean, std)
    splits = {}
    for name, source in given(test, train, calibration, holdout).items():
        pixels, labels = source if isinstance(source, tuple) else (source, None)
        made = _pixels(pixels, layout, name)
        numbers = labels_of(name, labels, len(made), classes)
        splits[name] = _pixel_rows(made, numbers, constants, batch_size)
    return classification_of(splits, classes)


def image_folder(
    path: File,
    *,
    size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 50,
) -> Task:
    """A task on image files in one folder per class, decoded batch by batch.

    The classes lie in `path`/test and `path`/train (or val, calibration, holdout), or straight in
    `path`, which then is test. They are sorted by name.

    size: the shorter side is resized to it, and the middle `size` x `size` pixels kept
    mean, std: per channel, for pixels 0..1
    """
    check_count(size, "size")
    check_count(batch_size, "batch_size")
    _pillow()
    root = existing(path)
    parts = {
        name: next((root / other for other in others if (root / other).is_dir()), None)
        for name, others in FOLDERS.items()
    }
    folders = {name: folder for name, folder in parts.items() if folder} or {"test": root}
    found = {name: _files(folder) for name, folder in folders.items()}
    classes = sorted({file.parent.name for files in found.values() for file in files})
    constants = _constants(mean, std)
    splits = {
        name: _file_rows(files, classes, size, constants, batch_size)
        for name, files in found.items()
    }
    return classification_of(splits, classes)


Constants: TypeAlias = tuple[Tensor, Tensor] | None


def _constants(mean: Sequence[float] | None, std: Sequence[float] | None) -> Constants:
    if mean is None and std is None:
        return None
    middle, spread = torch.tensor(mean or [0.0]), torch.tensor(std or [1.0])
    if not (spread > 0).all():
        raise OptionError(f"std={std!r} must be above 0 for every channel")
    return middle.float().view(1, -1, 1, 1), spread.float().view(1, -1, 1, 1)


def _pixels(source: Any, layout: Layout, name: str) -> Tensor:
    """(n, channels, height, width), still of the type given."""
    pixels = as_tensor(source, f"{name} pixels")
    axes = {"NCHW": 1, "NHWC": 3, "NHW": None}[layout]
    shape = tuple(pixels.shape)
    if pixels.dim() != len(layout) or (axes is not None and shape[axes] not in (1, 2, 3, 4)):
        raise TaskError(
            f"{name} pixels have shape {shape}, which is not layout={layout!r} (1 to 4 channels); "
            'use "NCHW", "NHWC", or "NHW" for grey pictures'
        )
    if not pixels.is_floating_point() and (pixels.min() < 0 or pixels.max() > 255):
        raise TaskError(f"{name} pixels lie outside 0..255; give uint8, or floats as they are used")
    finite(pixels, f"{name} pixels")
    if layout == "NHW":
        return pixels[:, None]
    return pixels.permute(0, 3, 1, 2) if layout == "NHWC" else pixels


def _normal(pixels: Tensor, constants: Constants) -> Tensor:
    if not pixels.is_floating_point():
        pixels = pixels.float() / 255
    if constants is None:
        return pixels.contiguous()
    if constants[0].shape[1] not in (1, pixels.shape[1]):
        raise OptionError(
            f"mean and std have {constants[0].shape[1]} values for {pixels.shape[1]} channels"
        )
    mean, std = (each.to(pixels.device) for each in constants)
    return ((pixels - mean) / std).contiguous()


def _pixel_rows(
    pixels: Tensor, labels: Tensor | None, constants: Constants, batch_size: int
) -> Rows:
    def gather(positions: Tensor) -> Batch:
        inputs = _normal(pixels[positions], constants)
        return inputs, None if labels is None else labels[positions]

    return Rows(len(pixels), gather, batch_size)


def _files(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.glob("*/*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise TaskError(
            f"{folder} has no pictures ({', '.join(sorted(SUFFIXES))}) in folders named after "
            "their classes"
        )
    return files


def _file_rows(
    files: list[Path], classes: list[str], size: int, constants: Constants, batch_size: int
) -> Rows:
    labels = torch.tensor([classes.index(file.parent.name) for file in files])

    def gather(positions: Tensor) -> Batch:
        pictures = [_decoded(files[at], size) for at in positions.tolist()]
        inputs = torch.stack(pictures) if pictures else torch.empty(0, 3, size, size)
        return _normal(inputs, constants), labels[positions]

    return Rows(len(files), gather, batch_size)


def _decoded(file: Path, size: int) -> Tensor:
    """(3, size, size) uint8: the middle of the picture, its shorter side resized to `size`."""
    image = _pillow()
    try:
        with image.open(io.BytesIO(file.read_bytes())) as picture:
            width, height = picture.size
            scale = size / min(width, height)
            resized = picture.convert("RGB").resize(
                (max(size, round(width * scale)), max(size, round(height * scale))),
                image.Resampling.BILINEAR,
            )
    except OSError as error:
        raise TaskError(f"{file} cannot be read as a picture: {error}; remove it") from error
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    middle = resized.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(middle)).permute(2, 0, 1)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("data", "Pillow") from error
    return Image
