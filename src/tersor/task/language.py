"""Tasks on text as such: language models, and sentence embeddings judged on pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tersor.errors import OptionError, TaskError
from tersor.task.data import Batch, Rows, Split, Stream, as_tensor, check_count, given
from tersor.task.kinds import Pooling
from tersor.task.makers import again, is_loader
from tersor.task.metrics import EMBEDDING, LANGUAGE
from tersor.task.task import Task
from tersor.task.tokens import encode, padded, padding_of, token_ids, tokenizer_from

# Two sentences, and how alike they are.
Pair: TypeAlias = Sequence[Any]


def language_model(
    test: Any = None,
    train: Any = None,
    calibration: Any = None,
    holdout: Any = None,
    *,
    tokenizer: Any = None,
    length: int | None = None,
    max_length: int = 512,
    batch_size: int = 8,
) -> Task:
    """A task of predicting the next token, judged by perplexity.

    Each split: documents (a list of texts or of token ids), one long text or (tokens,) tensor,
    blocks (n, tokens), or a loader of batches of blocks.
    tokenizer: turns texts into ids; a function, or a local Hugging Face folder
    length: cut everything into blocks that predict this many tokens each; None reads every
      document on its own, from its first `max_length` tokens
    batch_size: blocks at a time; documents always run one at a time, so that none is padded
    """
    check_count(max_length, "max_length")
    check_count(batch_size, "batch_size")
    notes: list[str] = []
    reader = tokenizer_from(tokenizer)
    splits: dict[str, Split] = {}
    for name, source in given(test, train, calibration, holdout).items():
        if is_loader(source):
            splits[name] = Stream(again(source, name), partial(_loaded_blocks, name=name))
            continue
        documents = _documents(source, name, reader)
        if length is not None:
            documents = _blocks(documents, check_count(length, "length"), name, notes)
        elif len(documents) == 1 and not isinstance(source, list):
            raise OptionError(f"{name} is one long text; give length, the tokens of a block")
        else:
            documents = _usable(documents, max_length, name, notes)
        splits[name] = _rows(documents, batch_size)
    return Task("language", LANGUAGE, splits, notes=notes)


def sentence_pairs(
    test: Sequence[Pair] | None = None,
    train: Sequence[Pair] | None = None,
    calibration: Sequence[Pair] | None = None,
    holdout: Sequence[Pair] | None = None,
    *,
    tokenizer: Any,
    pooling: Pooling = "mean",
    score_range: tuple[float, float] = (0.0, 5.0),
    max_length: int = 256,
    batch_size: int = 64,
) -> Task:
    """A task of embedding sentences, judged by how well cosines rank the pairs (Spearman).

    test, train: (sentence1, sentence2, score) each; calibration and holdout may leave out the score
    tokenizer: Hugging Face's, its local folder, or a function from a text to token ids
    pooling: one vector of a sentence's outputs by their "mean" or the first ("cls"); None where the
      model gives one vector already
    score_range: the scores of the least and the most alike

    A batch of n pairs has 2 n rows: the first pair's sentences, then the second's. `model(**batch)`
    works on it.
    """
    if pooling not in ("mean", "cls", None):
        raise OptionError(f'pooling={pooling!r} must be "mean", "cls" or None')
    if len(score_range) != 2 or not score_range[0] < score_range[1]:
        raise OptionError(f"score_range={score_range!r} must be two rising numbers")
    check_count(batch_size, "batch_size")
    check_count(max_length, "max_length")
    reader = tokenizer_from(tokenizer)
    splits: dict[str, Split] = {}
    for name, pairs in given(test, train, calibration, holdout).items():
        scores = _scores(pairs, name, score_range)
        splits[name] = _pair_rows(pairs, scores, reader, max_length, batch_size)
    return Task("embedding", EMBEDDING, splits, pooling=pooling, score_range=score_range)


def _documents(source: Any, name: str, tokenizer: Any) -> list[Tensor]:
    """Each document's token ids."""
    if isinstance(source, Path):
        if not source.is_file():
            raise TaskError(f"{name}: {source} does not exist; give a text file")
        source = source.read_text(encoding="utf-8")
    texts = [source] if isinstance(source, str) else source
    if isinstance(texts, Tensor | np.ndarray):
        ids = as_tensor(texts, name)
        texts = list(ids) if ids.dim() == 2 else [ids]
    if not isinstance(texts, Iterable):
        raise TaskError(f"{name}={texts!r} is not a list of documents, a text or token ids")
    documents = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise TaskError(f"{name} holds texts; give the tokenizer that turns them into ids")
            documents.append(token_ids(tokenizer, text))
            continue
        ids = as_tensor(text, f"{name}, document {number}")
        if ids.dim() != 1 or ids.is_floating_point():
            raise TaskError(
                f"{name}, document {number} has shape {tuple(ids.shape)} and dtype {ids.dtype}; a "
                "document is a row of whole numbers, its token ids"
            )
        documents.append(ids.long())
    if not documents:
        raise TaskError(f"{name}: there are no documents; give at least one")
    return documents


def _usable(documents: list[Tensor], most: int, name: str, notes: list[str]) -> list[Tensor]:
    """Documents that have something to predict, none longer than `most` tokens."""
    used = [document[:most] for document in documents if len(document) > 1]
    if not used:
        raise TaskError(f"{name}: no document has two tokens, so there is nothing to predict")
    if len(used) < len(documents):
        notes.append(f"{name} leaves out {len(documents) - len(used)} documents without 2 tokens")
    cut = sum(len(document) > most for document in documents)
    if cut:
        notes.append(f"{name} uses the first {most} tokens of {cut} longer documents")
    return used


def _blocks(documents: list[Tensor], length: int, name: str, notes: list[str]) -> list[Tensor]:
    """All documents in a row, cut so that each token but the first is predicted once."""
    ids = torch.cat(documents)
    blocks = list(ids.unfold(0, length + 1, length)) if len(ids) > length else []
    if not blocks:
        raise TaskError(f"{name} has {len(ids)} tokens, too few for a block of length={length}")
    left = len(ids) - 1 - len(blocks) * length
    if left:
        notes.append(f"{name} leaves out its last {left} tokens, which fill no block of {length}")
    return blocks


def _rows(documents: list[Tensor], batch_size: int) -> Rows:
    """Documents of one length run together, others one at a time."""
    alike = len({len(document) for document in documents}) == 1

    def gather(positions: Tensor) -> Batch:
        picked = [documents[at] for at in positions.tolist()]
        # Only `example` asks for several documents of different lengths.
        shortest = min((len(document) for document in picked), default=0)
        ids = torch.stack([document[:shortest] for document in picked])
        return ids[:, :-1], ids[:, 1:]

    return Rows(len(documents), gather, batch_size if alike else 1)


def _loaded_blocks(item: Any, *, name: str) -> Batch:
    """A loader's batch of token ids as inputs and the tokens that follow them."""
    mask = None
    if isinstance(item, Mapping):
        mask, item = item.get("attention_mask"), item.get("input_ids")
    elif isinstance(item, tuple | list) and item and isinstance(item[0], Tensor):
        item = item[0]
    if not isinstance(item, Tensor) or item.dim() != 2 or item.is_floating_point():
        raise TaskError(
            f"{name} must yield token ids of shape (batch, tokens), bare or as "
            '{"input_ids": ids}; give texts or documents otherwise'
        )
    if mask is not None and not bool(torch.as_tensor(mask).all()):
        raise TaskError(f"{name} yields padded batches; give a list of documents instead")
    return item[:, :-1].long(), item[:, 1:].long()


def _scores(pairs: Sequence[Pair], name: str, score_range: tuple[float, float]) -> Tensor | None:
    """The scores of `pairs`, None for unlabelled ones. Raises TaskError for malformed pairs."""
    if not pairs:
        raise TaskError(f"{name}: there are no pairs; give at least one")
    labelled = name in ("test", "train")
    scores = []
    for number, pair in enumerate(pairs):
        sizes = (3,) if labelled else (2, 3)
        whole_pair = isinstance(pair, tuple | list) and len(pair) in sizes
        if not whole_pair or not all(isinstance(sentence, str) for sentence in pair[:2]):
            raise TaskError(
                f"{name}, pair {number} is {pair!r}; it must be (sentence1, sentence2, score)"
            )
        if not labelled:
            continue
        try:
            scores.append(float(pair[2]))
        except (TypeError, ValueError) as error:
            raise TaskError(f"{name}, pair {number}: {pair[2]!r} is not a score") from error
        # Written so that a NaN fails too.
        if not score_range[0] <= scores[-1] <= score_range[1]:
            raise TaskError(
                f"{name}, pair {number}: the score {scores[-1]} is outside "
                f"score_range={score_range}; give the range of your scores"
            )
    return torch.tensor(scores) if labelled else None


def _pair_rows(
    pairs: Sequence[Pair], scores: Tensor | None, tokenizer: Any, max_length: int, batch_size: int
) -> Rows:
    encoded = [encode(tokenizer, text, max_length) for pair in pairs for text in pair[:2]]
    padding = padding_of(tokenizer)

    def gather(positions: Tensor) -> Batch:
        sentences = [encoded[2 * at + side] for at in positions.tolist() for side in (0, 1)]
        return padded(sentences, padding), None if scores is None else scores[positions]

    return Rows(len(pairs), gather, batch_size)
