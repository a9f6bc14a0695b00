"""What the blocks of a network are called with, found by letting the network itself call them.

Only what comes before the blocks is loaded for that. The blocks' places are taken by stand-ins that
note what they are given and hand the hidden states on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.checkpoints.weights import Weights
from tersor.errors import CompressError, ModelError

Table = Callable[[Tensor], Tensor]
"""Rows of the token embedding by their indices, as float32."""


@dataclass(frozen=True)
class Call:
    """How a block is called beside its hidden states. key: their name, None for the first place"""

    key: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
        """The hidden states of a call, and the rest of it."""
        if args:
            return args[0], cls(None, args[1:], dict(kwargs))
        key = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return kwargs[key], cls(key, (), {n: v for n, v in kwargs.items() if n != key})

    def __call__(self, block: nn.Module, hidden: Tensor) -> Any:
        """What the block makes of hidden states."""
        if self.key is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(**{self.key: hidden}, **self.kwargs)


class Stem:
    """What a network does before its first block, without the weights of anything else."""

    def __init__(self, model: nn.Module, path: str, weights: Weights, table: Table | None) -> None:
        """model: the skeleton, which stays as it is; path: of its blocks

        table: gives the rows of the token embedding, where they are not the checkpoint's
        """
        self._model = copy.deepcopy(model)
        config: Any = getattr(self._model, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        blocks = self._model.get_submodule(path)
        inside = set(blocks.modules())
        embedding = token_embedding(self._model)
        for name, module in self._model.named_modules():
            if embedding is not None and module is embedding:
                embedding.padding_idx = None
                # Not on meta, where some networks would send the ids to meet it.
                embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)
                rows = table or _rows_of(weights, f"{name}.weight")
                embedding.register_forward_pre_hook(_looking_up(rows))
            elif module not in inside:
                module.register_forward_pre_hook(_filling(weights, name))
        self._seen = _Seen()
        self.count = len(list(blocks.children()))
        for at, block in enumerate(list(blocks.children())):
            blocks[at] = _Standin(block, self._seen)  # type: ignore[operator]

    def first(self, ids: Tensor) -> tuple[Tensor, Call]:
        """The hidden states (rows, length, width) that the first block is given, and its call."""
        hidden, call = self._run(ids, 1, False)[0]
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != ids.shape:
            found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ModelError(
                f"the first block is given {found} for token ids of shape {tuple(ids.shape)}, not "
                "hidden states (sequences, length, width); load the network whole and use "
                "tersor.run"
            )
        return hidden, call

    def calls(self, ids: Tensor, *, tuples: bool) -> list[Call]:
        """The calls of all blocks. tuples: whether blocks give their hidden states in a tuple"""
        return [call for _, call in self._run(ids, self.count, tuples)]

    def _run(self, ids: Tensor, count: int, tuples: bool) -> list[tuple[Tensor, Call]]:
        self._seen.calls, self._seen.wanted, self._seen.tuples = [], count, tuples
        try:
            with torch.no_grad():
                self._model(ids)
        except _ReachedError:
            return self._seen.calls
        except CompressError:
            raise
        # Whatever the network's own code raises.
        except Exception as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"{type(self._model).__name__} cannot be run up to its blocks on token ids of "
                f"shape {tuple(ids.shape)}: {said:.200}; load it whole and use tersor.run"
            ) from error
        raise ModelError(
            f"{type(self._model).__name__} called {len(self._seen.calls)} of its {self.count} "
            "blocks, so they do not run one after another; load it whole and use tersor.run"
        )


def token_embedding(model: nn.Module) -> nn.Embedding | None:
    """The table that token ids are looked up in; None where there is none.

    Where the network does not say, it is the one of most rows: others are of positions or kinds.
    """
    asked: Any = getattr(model, "get_input_embeddings", None)
    if asked is not None:
        found = asked()
        return found if isinstance(found, nn.Embedding) else None
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(tables, key=lambda table: table.num_embeddings, default=None)


def hidden_in(output: Any) -> Tensor:
    """The hidden states in what a block gives."""
    found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor):
        raise ModelError(
            f"a block gives a {type(found).__name__} where its hidden states should be; load the "
            "network whole and use tersor.run"
        )
    return found


def check_alike(first: Call, other: Call) -> None:
    """Raises ModelError where two batches need different calls of a block."""
    ones, others = _leaves(first), _leaves(other)
    if len(ones) != len(others) or not all(map(_same, ones, others)):
        raise ModelError(
            "the blocks are called differently for each batch of token ids, which cannot be "
            "kept on disk; load the network whole and use tersor.run"
        )


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        return type(one) is type(two) and torch.equal(one, two)
    return one is two or bool(one == two)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Call):
        return _leaves([value.key, value.args, value.kwargs])
    if isinstance(value, Mapping):
        return [leaf for key in sorted(value) for leaf in [key, *_leaves(value[key])]]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


class _ReachedError(Exception):
    """All calls that were wanted have been seen."""


@dataclass
class _Seen:
    """Calls of blocks so far. wanted: how many there should be"""

    calls: list[tuple[Tensor, Call]] = field(default_factory=list)
    wanted: int = 0
    tuples: bool = False


class _Standin(nn.Module):
    """Takes a block's place, with its attributes: networks ask blocks what kind they are."""

    def __init__(self, block: nn.Module, seen: _Seen) -> None:
        super().__init__()
        self.__dict__["_block"], self.__dict__["_seen"] = block, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, call = Call.of(args, kwargs)
        self._seen.calls.append((hidden, call))
        if len(self._seen.calls) == self._seen.wanted:
            raise _ReachedError
        return (hidden,) if self._seen.tuples else hidden


def _filling(weights: Weights, path: str) -> Callable[..., None]:
    """Loads what a module itself owns when it is first called."""
    filled: set[nn.Module] = set()

    def hook(module: nn.Module, _: Any) -> None:
        if module not in filled:
            weights.fill(module, path, inside=False)
            filled.add(module)

    return hook


def _rows_of(weights: Weights, name: str) -> Table:
    return lambda at: weights.tensor(name)[at].float()


def _looking_up(rows: Table) -> Callable[..., Any]:
    """Keeps only those rows of a table that are asked for."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept, places = args[0].unique(return_inverse=True)
        module.weight = nn.Parameter(rows(kept), requires_grad=False)
        return (places, *args[1:])

    return hook
