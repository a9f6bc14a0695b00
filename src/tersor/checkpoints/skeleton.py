"""The network of a Hugging Face folder without its weights, and where its blocks are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tersor.errors import MissingExtra, ModelError


def skeleton_of(folder: Path) -> nn.Module:
    """The language model that config.json describes, in evaluation mode; its weights are on meta.

    What is computed rather than loaded, such as the angles of rotary positions, has its values. No
    code of the folder is run. Raises ModelError for a folder that transformers cannot read.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"the folder {folder} has no config.json, so its network is unknown; name a Hugging "
            "Face folder, or build the network on the meta device and pass it as model="
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise MissingExtra("hf", "transformers") from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.use_cache = False
        with _Unfilled():
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    # Odd settings surface as errors of many types.
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{folder} describes no language model that transformers can build: {said:.200}; "
            "repair config.json, or pass the network, built on the meta device, as model="
        ) from error
    return without_weights(model)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the network with all parameters on the meta device, tied ones still tied."""
    empty: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty).eval()


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path of the blocks that run one after another, and their list.

    It is the list of modules of one class that has most of the network's weights.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in found]
    if not any(sizes):
        raise ModelError(
            f"{type(model).__name__} has no list of blocks of one class (torch.nn.ModuleList), so "
            "it cannot be quantized block by block; load it whole and use tersor.run"
        )
    return found[sizes.index(max(sizes))]


class _Unfilled(TorchFunctionMode):
    """Puts what is only allocated, as parameters are before they are filled, on the meta device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)
