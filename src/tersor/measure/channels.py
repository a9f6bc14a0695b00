"""What batch norms see: mean and variance of each channel of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.measure.running import evaluating
from tersor.task import Inputs, Task

Norms = dict[str, _BatchNorm]


@dataclass(frozen=True)
class Channels:
    """Sums over everything that was seen.

    count: of values in a channel
    total, squares: (channels,) float64, of the values and of their squares
    """

    count: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Channels:
        """values: (samples, channels, ...)"""
        channels = values.detach().transpose(0, 1).flatten(1).double()
        return cls(channels.shape[1], channels.sum(1), channels.square().sum(1))

    def __add__(self, other: Channels | None) -> Channels:
        if other is None:
            return self
        return Channels(
            self.count + other.count, self.total + other.total, self.squares + other.squares
        )

    @property
    def mean(self) -> Tensor:
        """(channels,) float64"""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """(channels,) float64, of all values there were"""
        return (self.squares / self.count - self.mean.square()).clamp(min=0)


def norms_of(model: nn.Module) -> Norms:
    """Batch norms with running statistics, by path."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def channels(model: nn.Module, task: Task, batches: Sequence[Inputs]) -> list[dict[str, Channels]]:
    """What each batch norm sees of each batch."""
    norms, found = norms_of(model), list[dict[str, Channels]]()

    def watch(name: str, values: Tensor) -> None:
        found[-1][name] = Channels.of(values) + found[-1].get(name)

    if not norms:
        return []
    with evaluating(model), before_each(norms, watch):
        for inputs in batches:
            found.append({})
            task.predict(model, inputs)
    return found


@contextmanager
def before_each(norms: Norms, call: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block `call(name, inputs)` comes before each batch norm runs."""
    with ExitStack() as stack:
        for name, norm in norms.items():
            hook = norm.register_forward_pre_hook(
                lambda _, inputs, name=name: call(name, inputs[0])
            )
            stack.callback(hook.remove)
        yield
