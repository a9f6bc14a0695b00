"""Keeps LSTM, GRU and plain recurrent layers whole while a model is exported.

torch.export unrolls them over the time steps of the example, which fixes the length of sequences.
Inside `whole_recurrences()` each becomes one opaque operator with the shapes of its results only;
the converter writes it down as the torch operator that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SETTINGS = (
    "bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, "
    "bool batch_first"
)
_STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}
_LIBRARY = torch.library.Library("tersor", "FRAGMENT")  # type: ignore[no-untyped-call]


def original(name: str) -> str | None:
    """Gives "lstm.input" for the opaque "tersor::lstm", None for any other operator."""
    kind = name.removeprefix("tersor::")
    return f"{kind}.input" if kind != name and kind in _STATES else None


def whole_recurrences() -> TorchFunctionMode:
    """A context in which recurrent layers are recorded whole."""
    return _Whole()


class _Whole(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]
        # The other overload, for packed sequences, has its weights in this place.
        if name in _STATES and len(args) == 9 and isinstance(args[3], bool) and not kwargs:
            return _opaque(name)(*args)
        return func(*args, **(kwargs or {}))


@cache
def _opaque(name: str) -> Any:
    state = "Tensor[] hx" if name == "lstm" else "Tensor hx"
    results = ", ".join(["Tensor"] * (_STATES[name] + 1))
    schema = f"{name}(Tensor input, {state}, Tensor[] params, {_SETTINGS}) -> ({results})"
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"tersor::{name}", _shapes, lib=_LIBRARY)
    return getattr(torch.ops.tersor, name).default


def _shapes(
    x: Tensor,
    hx: Any,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    states = hx if isinstance(hx, list | tuple) else [hx]
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    return (x.new_empty(*x.shape[:-1], width), *(torch.empty_like(state) for state in states))
