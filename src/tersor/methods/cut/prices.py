"""Prices: what each tensor of a network costs, in multiply-adds, bytes or milliseconds."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import numpy as np
from torch import nn

from tersor.measure import macs
from tersor.measure.running import runner, wait
from tersor.methods.clock import Of
from tersor.task import Inputs, device_of

_REPEATS = 20


def prices(model: nn.Module, inputs: Inputs, of: Of) -> dict[str, float]:
    """By name of a parameter. What no weight does, such as attention's products, is under "".

    of: multiply-adds or milliseconds of the batch, or bytes of the parameters
    """
    if of == "bytes":
        return {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    by_layer = dict(macs(model, inputs).by_layer) if of == "macs" else _milliseconds(model, inputs)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, float] = defaultdict(float)
    for path, cost in by_layer.items():
        own = model.get_submodule(path)._parameters.values()
        weights = [p for p in own if p is not None and p.dim() > 1]
        total = sum(weight.numel() for weight in weights)
        for weight in weights:
            found[names[id(weight)]] += cost * weight.numel() / total
        if not weights:
            found[""] += cost
    return dict(found)


def _milliseconds(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Median time of each layer that has weights; what is left of the whole is under ""."""
    layers = {
        path: module
        for path, module in model.named_modules()
        if path and any(p is not None and p.dim() > 1 for p in module._parameters.values())
    }
    times: dict[str, list[float]] = {path: [] for path in ["", *layers]}
    started: dict[str, float] = {}
    device = device_of(model)

    def enter(path: str) -> None:
        wait(device)
        started[path] = time.perf_counter()

    def leave(path: str) -> None:
        wait(device)
        times[path][-1] += 1000 * (time.perf_counter() - started[path])

    with ExitStack() as stack, runner(model, inputs) as run:
        for path, layer in layers.items():

            def before(*_: Any, path: str = path) -> None:
                enter(path)

            def after(*_: Any, path: str = path) -> None:
                leave(path)

            stack.callback(layer.register_forward_pre_hook(before).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        for _ in range(_REPEATS):
            for each in times.values():
                each.append(0.0)
            enter("")
            run()
            leave("")
    found = {path: float(np.median(each)) for path, each in times.items()}
    found[""] = max(0.0, found[""] - sum(found[path] for path in layers))
    return found
