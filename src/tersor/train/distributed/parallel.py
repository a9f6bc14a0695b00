"""torch's own ways to train on many processes, and compressors inside them.

`add_hook` for DistributedDataParallel: any loop, any optimizer, gradients arrive averaged.
`shard` for networks whose weights do not fit on one device: parts of them travel at each layer, and
compressing those would change the weights themselves, so it goes without.

Source: Li et al. 2020, arXiv:2006.15704, section 4, for buckets and hooks; Zhao et al. 2023,
arXiv:2304.11277, for sharding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from tersor.errors import OptionError
from tersor.train.distributed.compressor import Compressor, Uncompressed
from tersor.train.distributed.exchange import Group, in_processes, world
from tersor.train.distributed.traffic import Traffic, plain_bytes

TORCH_HOOKS: Mapping[str, int] = {
    "allreduce": 4,
    "fp16_compress": 2,
    "bf16_compress": 2,
    "powerSGD": 4,
}
"""torch's communication hooks by the names of their functions, and bytes of a value, at most.

Its batched PowerSGD is not among them: in torch 2.13 it fails in its first step.
"""


@dataclass
class _Hook:
    """Waits for the last bucket of a backward pass, and then averages all gradients at once.

    So what a compressor keeps stays with its tensor, although torch builds its buckets anew behind
    the first step.

    places: of each parameter in the network, by its id
    """

    compressor: Compressor
    group: Group
    places: dict[int, int]
    traffic: Traffic = field(default_factory=Traffic)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    promises: list[tuple[Tensor, Future[Tensor]]] = field(default_factory=list)

    def take(self, bucket: Any) -> Future[Tensor]:
        """A promise of the bucket's averaged gradients."""
        buffer = bucket.buffer()
        promise: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else [])
        self.promises.append((buffer, promise))
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            self.gradients[self.places[id(parameter)]] = gradient
        if bucket.is_last():
            self._average()
        return promise

    def _average(self) -> None:
        own = [self.gradients[place] for place in sorted(self.gradients)]
        averaged, sent = in_processes(self.compressor.average(own), self.group)
        for gradient, value in zip(own, averaged, strict=True):
            gradient.copy_(value)
        self.traffic.sent += sent
        self.traffic.plain += plain_bytes(own)
        for buffer, promise in self.promises:
            promise.set_result(buffer)
        self.gradients, self.promises = {}, []


def add_hook(
    parallel: DistributedDataParallel, compressor: Compressor, *, group: Group = None
) -> Traffic:
    """Lets `parallel` average its gradients through `compressor`. Returns what it will have sent.

    group: the one that `parallel` was made with
    """
    places = {id(parameter): place for place, parameter in enumerate(parallel.module.parameters())}
    hook = _Hook(compressor, group, places)
    parallel.register_comm_hook(hook, lambda taker, bucket: taker.take(bucket))
    return hook.traffic


@dataclass
class _TorchHook:
    """One of torch's hooks, and the bytes it hands over.

    state: what torch calls the hook with: of PowerSGD its own, of the others the group
    size: bytes of a value, at most
    """

    function: Callable[[Any, Any], Any]
    state: Any
    size: int
    traffic: Traffic = field(default_factory=Traffic)

    def take(self, bucket: Any) -> Any:
        """A promise of the bucket's averaged gradients."""
        buffer = bucket.buffer()
        self.traffic.plain += plain_bytes([buffer])
        state, size = self.state, min(self.size, buffer.element_size())
        if not hasattr(state, "start_powerSGD_iter") or state.iter < state.start_powerSGD_iter:
            self.traffic.sent += size * buffer.numel()
            return self.function(state, bucket)
        before = state.total_numel_after_compression
        promise = self.function(state, bucket)
        self.traffic.sent += size * (state.total_numel_after_compression - before)
        return promise


def add_torch_hook(
    parallel: DistributedDataParallel,
    name: str,
    *,
    rank: int = 2,
    start: int = 1000,
    group: Group = None,
) -> Traffic:
    """Lets `parallel` use one of torch's own hooks. Returns what it will have sent.

    name: in `TORCH_HOOKS`
    rank, start: of PowerSGD: of its matrices, and steps before it that average plainly, at least 2
    group: the one that `parallel` was made with
    """
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if name not in TORCH_HOOKS:
        raise OptionError(f"name={name!r} is no hook of torch; the names are {list(TORCH_HOOKS)}")
    state: Any = group
    if name == "powerSGD":
        state = powerSGD_hook.PowerSGDState(
            group, matrix_approximation_rank=rank, start_powerSGD_iter=start
        )
    function = getattr(powerSGD_hook if name == "powerSGD" else default_hooks, f"{name}_hook")
    hook = _TorchHook(function, state, TORCH_HOOKS[name])
    parallel.register_comm_hook(hook, lambda taker, bucket: taker.take(bucket))
    return hook.traffic


def shard(model: nn.Module, *, compressor: Compressor | None = None) -> nn.Module:
    """Splits weights, gradients and what the optimizer keeps among all processes, in place.

    Modules in a ModuleList are gathered one at a time, the rest together. Make the optimizer
    afterwards. Raises OptionError without a process group, and for a compressor.
    """
    if compressor is not None and not isinstance(compressor, Uncompressed):
        raise OptionError(
            f"compressor={type(compressor).__name__} does not go with a sharded model, whose "
            "gradients are never whole on a worker; leave it out, or use add_hook instead of shard"
        )
    workers = world()[1]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (workers,))
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # Inner ones first, as torch asks for.
    for blocks in reversed(lists):
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
