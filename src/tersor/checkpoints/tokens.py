"""Calibration data of a language model: sequences of token ids, all of one length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tersor.errors import TaskError
from tersor.task.tokens import token_ids, tokenizer_from

_CHARACTERS = 16
"""Read for each token that is wanted; a token seldom has more."""


def read_tokens(
    path: str | Path, folder: str | Path, *, sequences: int = 16, length: int = 512
) -> Tensor:
    """(sequences, length) token ids from the start of a text, or of the ids in a .npy file.

    folder: whose tokenizer reads the text

    Fewer sequences where the file is short. Raises TaskError for less than one.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(f"{path} does not exist; give a text file, or token ids as .npy")
    if path.suffix == ".npy":
        ids = _stored(path)
    else:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_CHARACTERS * sequences * length)
        ids = token_ids(tokenizer_from(folder), text)
    count = min(sequences, len(ids) // length)
    if not count:
        raise TaskError(
            f"{path} has {len(ids)} tokens, fewer than one sequence of length={length}; give a "
            "longer text, or a smaller length"
        )
    return ids[: count * length].reshape(count, length).clone()


def check_tokens(ids: Tensor, vocabulary: int) -> Tensor:
    """The ids as int64. Raises TaskError unless they are (sequences, length) of the vocabulary."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        said = f"{tuple(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else f"{ids!r:.40}"
        raise TaskError(
            f"calibration={said} are no token ids: give whole numbers (sequences, length), such as "
            "tersor.checkpoints.read_tokens makes"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise TaskError(
            f"calibration has token ids from {low} to {high}, and the network knows 0 to "
            f"{vocabulary - 1}; use the tokenizer of this network"
        )
    return ids.long()


def _stored(path: Path) -> Tensor:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read as an array: {error}; save it again") from error
    if found.dtype.kind not in "iu":
        raise TaskError(f"{path} holds {found.dtype}; token ids are whole numbers")
    return torch.from_numpy(found.astype(np.int64)).reshape(-1)
