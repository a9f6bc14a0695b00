"""Running a model to look at it: in evaluation mode, decoded, no gradients, left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.errors import ModelError, OptionError
from tersor.surgery.hold import decoded
from tersor.task import call, device_of, evaluation_mode, placed

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
Runner = Callable[[], object]
"""One run of anything: a torch model, or a session of an exported runtime."""


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every aten operator that runs while it is active."""

    def __init__(self) -> None:
        """Nothing but what torch needs."""
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Or torch would load its compiler for every mode, for seconds, to keep it out.
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.see(func, args, kwargs or {})

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func(*args, **kwargs)` is to give; a subclass looks, and usually runs it."""
        raise NotImplementedError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, no gradients, and each form decoded once."""
    with evaluation_mode(model), decoded(model):
        yield model


@contextmanager
def runner(model: nn.Module, inputs: Inputs) -> Iterator[Runner]:
    """A call without arguments that runs `model` on `inputs`, for as long as the block lasts."""
    inputs, device = placed(model, inputs), device_of(model)

    def run() -> object:
        outputs = call(model, inputs)
        wait(device)
        return outputs

    with evaluating(model):
        yield run


def wait(device: torch.device) -> None:
    """Until all is computed that a GPU was asked for: its operators return before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def using_threads(threads: int | None) -> Iterator[int]:
    """Lets torch compute on so many threads inside the block; None leaves the number as it is."""
    before = torch.get_num_threads()
    if threads is not None and threads < 1:
        raise OptionError(f"threads={threads}; at least 1 is needed")
    if threads not in (None, before):
        torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gradients reach these inside the block, and are asked for as before after it."""
    before = [(p, p.requires_grad) for p in parameters if p.is_floating_point()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@contextmanager
def unfused() -> Iterator[None]:
    """Attention as its separate operators; the fused encoder layer hides its products in one."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Recurrent layers that pass gradients in evaluation mode too, as those of cuDNN do not."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def whole_floats() -> Iterator[None]:
    """Products of float32 in all of its bits; of those of convolutions a GPU takes 11 otherwise.

    Whoever has set torch's newer `fp32_precision` keeps what was chosen: the older switches cannot
    be read then, and with the newer ones changed torch 2.13 exports nothing.
    """
    kinds: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        before = [kind.allow_tf32 for kind in kinds]
    except RuntimeError:
        yield
        return
    try:
        for kind in kinds:
            kind.allow_tf32 = False
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


def batch_of(inputs: Any) -> int:
    """Size of the first dimension of the first tensor, 1 where there is none."""
    first = next(tensors_in(inputs), None)
    return max(1, len(first)) if first is not None and first.dim() else 1


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_in(value)


def check_outputs(outputs: Tensor, model: nn.Module, where: str) -> Tensor:
    """Raises ModelError if an output is NaN; infinite ones (masked logits) are an answer."""
    bad = torch.isnan(outputs).flatten(1).any(1) if outputs.dim() > 1 else torch.isnan(outputs)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ModelError(
            f"{type(model).__name__} gives NaN in {int(bad.sum())} of the {len(bad)} outputs of "
            f"{where}, first in number {first}; check that input and the model's weights"
        )
    return outputs
