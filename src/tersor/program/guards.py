"""Limits checked before an operator runs: numbers in a file from a stranger are only data.

Operators whose result can be far larger than what goes in (factories, repeats, padding, resizing)
refuse more than `LARGEST` elements; scalar arithmetic stays within 64 bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersor.errors import ModelError

LARGEST = 2**31
"""Most elements that one such operator may return."""

Function = Callable[..., Any]


def _bounded(run: Function, count: Callable[..., Any]) -> Function:
    """`run`, refused when `count` of its arguments is an integer above `LARGEST`."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        elements = count(*args, **kwargs)
        # Symbolic sizes (while the model is exported again) are left alone.
        if isinstance(elements, int | float) and not elements <= LARGEST:
            name = str(getattr(run, "__name__", run)).partition(".")[0]
            raise ModelError(
                f"{name} in the stored program asks for {elements:.3g} elements, above the limit "
                f"of {LARGEST}; the file is damaged or hostile, or the inputs are far too large"
            )
        return run(*args, **kwargs)

    return guarded


def _product(sizes: Iterable[Any]) -> Any:
    return math.prod(max(size, 1) if isinstance(size, int) else size for size in sizes)


def _steps(*args: Any, **_: Any) -> Any:
    numbers = [number for number in args if isinstance(number, int | float)]
    if len(numbers) != len(args) or not numbers:
        return None
    start, end = (0, numbers[0]) if len(numbers) == 1 else numbers[:2]
    step = numbers[2] if len(numbers) > 2 else 1
    return abs((end - start) / step) if step else math.inf


def _padded(x: Tensor, pad: list[Any], *_: Any, **__: Any) -> Any:
    sizes: list[Any] = list(x.shape)
    for index in range(min(len(pad) // 2, len(sizes))):
        sizes[-1 - index] = sizes[-1 - index] + pad[2 * index] + pad[2 * index + 1]
    return _product(sizes)


def _resized(x: Tensor, size: list[Any] | None, *rest: Any, **_: Any) -> Any:
    leading = _product(x.shape[:2])
    if size is not None:
        return leading * _product(size)
    scales = next((part for part in rest if isinstance(part, list | tuple)), ())
    return leading * math.prod(
        side * scale for side, scale in zip(x.shape[2:], scales, strict=False)
    )


def _one_hot(x: Tensor, classes: Any = -1) -> Any:
    return x.numel() * max(classes, 1) if isinstance(classes, int) else None


def _repeated(x: Tensor, times: Any, *_: Any, **__: Any) -> Any:
    if isinstance(times, Tensor):
        return None if torch.compiler.is_compiling() else times.sum().item() * _row(x)
    return x.numel() * times


def _row(x: Tensor) -> int:
    return max(1, x.numel() // max(1, x.shape[0] if x.dim() else 1))


def _last(x: Tensor) -> int:
    return max(1, x.shape[-1]) if x.dim() else 1


def _folded(x: Tensor, size: list[Any], *_: Any, **__: Any) -> Any:
    return _product(x.shape[:-1]) * _product(size)


def _transformed(x: Tensor, n: Any = None, *_: Any, **__: Any) -> Any:
    sides = n if isinstance(n, list | tuple) else [n or 1]
    return None if n is None else x.numel() * _product(sides)


_COUNTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("zeros", "ones", "full"), lambda size, *_, **__: _product(size)),
    **dict.fromkeys(
        ("new_zeros", "new_ones", "new_full", "expand", "broadcast_to"),
        lambda _, size, *__, **___: _product(size),
    ),
    **dict.fromkeys(("repeat", "tile"), lambda x, times, *_: x.numel() * _product(times)),
    "repeat_interleave": _repeated,
    "arange": _steps,
    **dict.fromkeys(("linspace", "logspace"), lambda _, __, steps, *___, **____: steps),
    **dict.fromkeys(("hann_window", "hamming_window"), lambda length, *_, **__: length),
    "eye": lambda n, m=None, **_: n * (n if m is None else m),
    **dict.fromkeys(("tril_indices", "triu_indices"), lambda row, col, *_, **__: 2 * row * col),
    "one_hot": _one_hot,
    **dict.fromkeys(
        (
            *("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d"),
            *("reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d"),
        ),
        _padded,
    ),
    **dict.fromkeys(
        (
            *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d")),
            *(f"upsample_{kind}" for kind in ("bilinear2d", "bicubic2d", "trilinear3d")),
            *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
            *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
        ),
        _resized,
    ),
    "col2im": _folded,
    "affine_grid_generator": lambda _, size, *__: 2 * _product(size),
    **dict.fromkeys(
        (
            *("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_fft2", "fft_ifft2"),
            *("fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn"),
        ),
        _transformed,
    ),
    "diag_embed": lambda x, offset=0, *_: x.numel() * (_last(x) + abs(offset)),
    "diag": lambda x, offset=0: (x.numel() + abs(offset)) ** 2 if x.dim() == 1 else None,
    "outer": lambda x, y: x.numel() * y.numel(),
    "kron": lambda x, y: x.numel() * y.numel(),
    "bincount": lambda _, __=None, least=0: least,
    "cartesian_prod": lambda xs: len(xs) * math.prod(x.numel() for x in xs),
    "meshgrid": lambda xs, **_: math.prod(x.numel() for x in xs),
    "block_diag": lambda xs: _product((sum(x.numel() for x in xs), sum(_last(x) for x in xs))),
}


def _fitting(run: Function, rule: Callable[..., bool]) -> Function:
    """`run`, refused when its tensors break `rule`: torch itself would read past their ends."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if not rule(*args, **kwargs):
            name = str(getattr(run, "__name__", run)).partition(".")[0]
            raise ModelError(
                f"the stored program calls {name} with weights whose shapes do not fit each other; "
                "the file is damaged or hostile"
            )
        return run(*args, **kwargs)

    return guarded


def _recurrent(
    x: Tensor,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    *settings: Any,
    gates: int,
) -> bool:
    bidirectional = settings[2]
    states = hx if isinstance(hx, list | tuple) else [hx]
    cells = num_layers * (2 if bidirectional else 1)
    if len(states) != (2 if gates == 4 else 1) or num_layers < 1 or x.dim() != 3:
        return False
    if any(state.dim() != 3 or state.shape[0] != cells for state in states):
        return False
    width, hidden = states[0].shape[2], states[-1].shape[2]
    step = 2 + 2 * has_biases + (width != hidden)
    if len(params) != cells * step or not all(p.is_floating_point() for p in params):
        return False
    rows, below = gates * hidden, width * (2 if bidirectional else 1)
    for cell in range(cells):
        first, second, *others = params[cell * step : (cell + 1) * step]
        inputs = x.shape[2] if cell < cells // num_layers else below
        shapes = [(rows, inputs), (rows, width), *[(rows,)] * (2 * has_biases), (width, hidden)]
        for given, shape in zip((first, second, *others), shapes, strict=False):
            if tuple(given.shape) != shape or not given.numel():
                return False
    return True


def _normed(v: Tensor, g: Tensor, dim: int = 0) -> bool:
    if not (v.numel() and v.is_floating_point() and v.dtype == g.dtype and g.dim() == v.dim()):
        return False
    return dim in (0, v.dim() - 1) and all(
        size == (v.shape[place] if place == dim else 1) for place, size in enumerate(g.shape)
    )


_RULES: dict[str, Callable[..., bool]] = {
    "lstm": partial(_recurrent, gates=4),
    "gru": partial(_recurrent, gates=3),
    "rnn_tanh": partial(_recurrent, gates=1),
    "rnn_relu": partial(_recurrent, gates=1),
    "_weight_norm": _normed,
    "_weight_norm_interface": _normed,
}

GUARDS: dict[str, Callable[[Function], Function]] = {
    **{name: partial(_bounded, count=count) for name, count in _COUNTS.items()},
    **{name: partial(_fitting, rule=rule) for name, rule in _RULES.items()},
}


def scalar(run: Function) -> Function:
    """`run` on numbers only: no tensors, lists or strings, and integers within 64 bits."""

    def guarded(*args: Any) -> Any:
        for number in args:
            if not isinstance(number, _NUMBERS):
                raise ModelError(
                    f"arithmetic in the stored program got a {type(number).__name__}, not a number"
                )
        if run is operator.pow and isinstance(args[1], int) and abs(args[1]) > 64:
            raise ModelError(f"power {args[1]} in the stored program is above the limit of 64")
        value = run(*args)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ModelError("an integer of the stored program does not fit 64 bits")
        return value

    return guarded


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
