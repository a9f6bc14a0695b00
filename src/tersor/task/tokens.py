"""Texts as token ids, and sequences of different lengths as padded batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tersor.errors import MissingExtra, TaskError

Tokenizer: TypeAlias = Callable[[str], Any]
# One text: each of a model's inputs by name, (length,) long.
Encoded: TypeAlias = dict[str, Tensor]


def tokenizer_from(tokenizer: Any) -> Any:
    """The tokenizer itself, or the one stored in a local Hugging Face folder."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    if not Path(tokenizer).is_dir():
        raise TaskError(f"tokenizer={str(tokenizer)!r} is not a folder; give one that exists")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("hf", "transformers") from error
    try:
        return AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    # Missing and damaged files surface as errors of many types.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TaskError(
            f"tokenizer={str(tokenizer)!r} holds no tokenizer that transformers can open: "
            f"{first:.200}; give the folder that a tokenizer was saved in"
        ) from error


def token_ids(tokenizer: Any, text: str, max_length: int | None = None) -> Tensor:
    """(length,) token ids of `text`, cut to `max_length`."""
    return encode(tokenizer, text, max_length)["input_ids"]


def encode(tokenizer: Any, text: str, max_length: int | None) -> Encoded:
    """`text` as a model's inputs, cut to `max_length` tokens.

    tokenizer: Hugging Face's, or a function or object with `encode` that gives a list of ids
    """
    if hasattr(tokenizer, "model_input_names"):
        # The tokenizer itself cuts, because it keeps the closing token.
        found = tokenizer(text, truncation=max_length is not None, max_length=max_length)
    else:
        read = tokenizer if callable(tokenizer) else tokenizer.encode
        found = read(text)
        found = getattr(found, "ids", found)
    try:
        if not isinstance(found, Mapping):
            found = {"input_ids": found, "attention_mask": [1] * len(found)}
        encoded = {n: torch.as_tensor(v).long().flatten()[:max_length] for n, v in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"the tokenizer does not give a list of token ids for {text!r}; use a function that "
            "returns whole numbers"
        ) from error
    if not len(encoded["input_ids"]):
        raise TaskError(f"the tokenizer finds no token in {text!r}; leave that text out")
    return encoded


def padded(encoded: Sequence[Encoded], padding: Mapping[str, int]) -> dict[str, Tensor]:
    """Sequences as one batch, each input filled up at the end to the longest."""
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [e[name] for e in encoded], batch_first=True, padding_value=padding.get(name, 0)
        )
        for name in encoded[0]
    }


def padding_of(tokenizer: Any) -> dict[str, int]:
    """What fills each input up; 0 where the tokenizer names no padding token."""
    return {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0}
