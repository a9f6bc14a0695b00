"""Multiply-accumulates, counted at the operators that a forward pass really runs.

Matrix products, convolutions, attention and recurrent layers count; adding a bias, normalizing,
activations, pooling and looking up embeddings do not, as in the figures that papers print.
Attention with a causal mask counts in full. Decoding a form is no arithmetic of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.forms.form import Form
from tersor.measure.figures import Figures
from tersor.measure.running import Inputs, Watching, batch_of, evaluating, tensors_in, unfused
from tersor.task import call, placed


@dataclass(frozen=True)
class Macs(Figures):
    """Multiply-accumulates of one pass.

    by_layer: path of a module ("layer1.0.conv1", "" for the model itself) -> its own
    batch: samples in the pass; everything is for all of them
    """

    total: int
    batch: int
    by_layer: dict[str, int]


def macs(model: nn.Module, inputs: Inputs) -> Macs:
    """Counts one evaluation pass of `model` over the batch `inputs`.

    An operator belongs to the innermost module whose forward runs it, or to the module inside that
    which owns its weight (attention's out_proj, a network rebuilt from a file).
    """
    with evaluating(model), unfused():
        counter = _Counter(model)
        with counter.follow(model), counter:
            call(model, placed(model, inputs))
    counts = {path: n for path, n in counter.counts.items() if n}
    return Macs(sum(counts.values()), batch_of(inputs), counts)


class _Counter(Watching):  # type: ignore[no-untyped-call]
    """Sees every aten operator, and knows which module is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self._running = [""]
        self._owners: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for tensor in _weights(module):
                self._owners.setdefault(tensor.untyped_storage().data_ptr(), []).append(path)

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Keeps track of the module that is running."""

        def leave(*_: Any) -> None:
            self._running.pop()

        hooks = []
        for path, module in model.named_modules():
            if not isinstance(module, Form):
                enter = partial(_enter, self._running, path)
                hooks.append(module.register_forward_pre_hook(enter))
                hooks.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = _RULES.get(func.overloadpacket)
        if rule is None:
            # Inside inference mode operators like `linear` arrive whole.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if rule is not None:
            path = self._path(args)
            self.counts[path] = self.counts.get(path, 0) + rule(out, *args)
        return out

    def _path(self, args: tuple[Any, ...]) -> str:
        running = self._running[-1]
        inside = f"{running}." if running else ""
        for tensor in tensors_in(args):
            for path in self._owners.get(tensor.untyped_storage().data_ptr(), ()):
                if path.startswith(inside) and path != running:
                    return path
        return running


def _enter(running: list[str], path: str, *_: Any) -> None:
    running.append(path)


def _weights(module: nn.Module) -> Iterator[Tensor]:
    if not isinstance(module, Form):
        yield from (p for p in module._parameters.values() if p is not None)
        yield from (f.value() for f in module._modules.values() if isinstance(f, Form))


def _product(out: Tensor, left: Tensor, right: Tensor, *_: Any) -> int:
    """(..., n, k) @ (..., k, m), and the same with vectors."""
    return out.numel() * left.shape[-1]


def _added_product(out: Tensor, bias: Tensor, left: Tensor, right: Tensor, *_: Any) -> int:
    return out.numel() * left.shape[-1]


def _added_products(out: Tensor, bias: Tensor, left: Tensor, right: Tensor, *_: Any) -> int:
    # addbmm sums over the batch too.
    return left.numel() * right.shape[-1]


def _convolution(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *_: Any,
) -> int:
    # Every output gathers from a window of the input; transposed, every input is spread over one.
    return (x if transposed else out).numel() * math.prod(weight.shape[1:])


def _attention(out: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """(batch, heads, length, width) each: query @ key, then the weights @ value."""
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return int(pairs * (query.shape[-1] + value.shape[-1]))


def _recurrent(out: Any, x: Tensor, inputs: Tensor, hidden: Tensor, *_: Any) -> int:
    """(steps, batch, width) through the two matrices of all gates."""
    return math.prod(x.shape[:2]) * (inputs.numel() + hidden.numel())


def _recurrences(out: Any, x: Tensor, weights: list[Tensor], *_: Any) -> int:
    """The same through the matrices of all layers; of packed sequences (steps, width)."""
    return math.prod(x.shape[:-1]) * sum(w.numel() for w in weights if w.dim() == 2)


def _trilinear(out: Tensor, left: Tensor, weight: Tensor, right: Tensor, *_: Any) -> int:
    """Bilinear, weight (outputs, a, b): the matrix of each output times `right`, then `left`."""
    outputs, a, b = weight.shape
    return left.shape[0] * outputs * a * (b + 1)


_A = torch.ops.aten
_RULES: dict[Any, Callable[..., int]] = {
    _A.mm: _product,
    _A.bmm: _product,
    _A.mv: _product,
    _A.dot: lambda out, left, right: left.numel(),
    _A.vdot: lambda out, left, right: left.numel(),
    _A._int_mm: _product,
    _A.addmm: _added_product,
    _A._addmm_activation: _added_product,
    _A.addmv: _added_product,
    _A.baddbmm: _added_product,
    _A.addbmm: _added_products,
    _A.convolution: _convolution,
    _A._scaled_dot_product_flash_attention_for_cpu: _attention,
    _A._scaled_dot_product_flash_attention: _attention,
    _A._scaled_dot_product_efficient_attention: _attention,
    _A._scaled_dot_product_cudnn_attention: _attention,
    _A._scaled_dot_product_fused_attention_overrideable: _attention,
    _A.mkldnn_rnn_layer: _recurrent,
    _A._cudnn_rnn: _recurrences,
    _A._trilinear: _trilinear,
}
