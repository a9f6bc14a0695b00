"""Budgets: what the compressed model may cost and must still do, as numbers that can be checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from tersor.errors import BudgetError

_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS = {
    "size": _BYTES,
    "memory": _BYTES,
    "macs": _COUNTS,
    "latency_ms": {"": 1, "ms": 1},
    "drop": {"": 1},
}
_EXAMPLES = {
    "size": "0.15x or 18.2MB",
    "memory": "0.5x or 200MB",
    "macs": "0.5x or 300M",
    "latency_ms": "0.5x or 12ms",
    "drop": "0.5 or 2%",
}
TARGETS = ("onnxruntime",)


Amount: TypeAlias = "Limit | str | float | None"


@dataclass(frozen=True)
class Limit:
    """A number, absolute or relative to the original model's."""

    value: float
    relative: bool = False

    def resolve(self, original: float) -> float:
        """The absolute limit, given what the original has."""
        return self.value * original if self.relative else self.value

    def __str__(self) -> str:
        """As it would be typed."""
        return f"{self.value:.12g}x" if self.relative else f"{self.value:.12g}"


@dataclass(frozen=True, init=False)
class Budget:
    """Limits on the written file and on the model in it; None is no limit.

    size: bytes of the .tersor file; relative to the original's safetensors file
    latency_ms: median milliseconds for the task's example batch, on `target` if one is named
    memory: peak bytes of activations for that batch
    macs: multiply-accumulates of one sample
    drop: how much the headline metric may get worse, in its own unit; relative to its value
    at_least: metric that should be high -> the value it must keep
    at_most: metric that should be low -> the value it must keep
    target: "onnxruntime" to check latency and quality on the exported ONNX file as well
    """

    size: Limit | None
    latency_ms: Limit | None
    memory: Limit | None
    macs: Limit | None
    drop: Limit | None
    at_least: dict[str, float]
    at_most: dict[str, float]
    target: str | None

    def __init__(
        self,
        *,
        size: Amount = None,
        latency_ms: Amount = None,
        memory: Amount = None,
        macs: Amount = None,
        drop: Amount = None,
        at_least: Mapping[str, float] | None = None,
        at_most: Mapping[str, float] | None = None,
        target: str | None = None,
    ) -> None:
        """Amounts as they are typed ("0.15x", "18.2MB", "2%"), as numbers, or as a `Limit`.

        Raises BudgetError for what is no amount, what nothing could meet or what asks for nothing.
        """
        given = {"size": size, "latency_ms": latency_ms, "memory": memory, "macs": macs}
        limits: dict[str, Any] = {
            name: None if amount is None else _limit(name, amount)
            for name, amount in {**given, "drop": drop}.items()
        }
        bounds = {"at_least": _bounds("at_least", at_least), "at_most": _bounds("at_most", at_most)}
        for name, value in {**limits, **bounds, "target": target}.items():
            # The only way to set what is frozen.
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if self.target is not None and self.target not in TARGETS:
            raise BudgetError(f"target={self.target!r} is not one of {list(TARGETS)}")
        limits = {name: limit for name in _UNITS if (limit := getattr(self, name)) is not None}
        if not (limits or self.at_least or self.at_most):
            raise BudgetError('the budget asks for nothing; name a limit, for example "size=0.25x"')
        for name, limit in limits.items():
            _check_limit(name, limit)
        both = self.at_least.keys() & self.at_most.keys()
        if both:
            raise BudgetError(f"{min(both)} is given twice in the budget; keep one of the two")

    @classmethod
    def of(cls, budget: Budget | str | Mapping[str, Any]) -> Budget:
        """A budget as given: itself, a line of text, or a mapping (from a job file)."""
        if isinstance(budget, Budget):
            return budget
        if isinstance(budget, str):
            return cls.parse(budget)
        known = [field.name for field in fields(cls)]
        for name in budget:
            if name not in known:
                raise BudgetError(
                    f"the budget knows no {name!r}; it knows {[*_UNITS, 'target']}, and bounds for "
                    "metrics like accuracy>=90 and perplexity<=4"
                )
        return cls(**budget)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads "size=0.15x, drop=0.5, spearman>=81.8, perplexity<=4, target=onnxruntime".

        Raises BudgetError for an unknown name, a limit given twice or a value that is no number.
        """
        found: dict[str, dict[str, str]] = {"=": {}, ">=": {}, "<=": {}}
        for item in filter(None, (part.strip() for part in text.split(","))):
            match = re.fullmatch(r"([^<>=]+)(>=|<=|=)([^<>=]+)", item)
            if match is None:
                raise BudgetError(
                    f"{item!r} in the budget {text!r} is not name=value; try size=0.15x"
                )
            name, sign, value = (part.strip() for part in match.groups())
            if any(name in given for given in found.values()):
                raise BudgetError(f"{name} is given twice in the budget; keep one of the two")
            found[sign][name] = value
        bounds = {"at_least": found[">="], "at_most": found["<="]}
        return cls.of(found["="] | {side: given for side, given in bounds.items() if given})

    @property
    def limits_quality(self) -> bool:
        """True where the budget says something about the task's metrics."""
        return bool(self.drop is not None or self.at_least or self.at_most)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `Budget.of` reads them back."""
        amounts = {n: str(limit) for n in _UNITS if (limit := getattr(self, n)) is not None}
        others = {"at_least": dict(self.at_least), "at_most": dict(self.at_most)}
        return amounts | {n: v for n, v in {**others, "target": self.target}.items() if v}

    def __str__(self) -> str:
        """As it would be typed."""
        plain = [f"{n}={v}" for n, v in self.as_json().items() if isinstance(v, str)]
        least = [f"{n}>={v:.12g}" for n, v in self.at_least.items()]
        return ", ".join([*plain, *least, *(f"{n}<={v:.12g}" for n, v in self.at_most.items())])


def _limit(name: str, value: Amount) -> Limit:
    if isinstance(value, Limit):
        return value
    match = re.fullmatch(
        r"([-+]?[0-9_]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z%]*)", str(value).strip()
    )
    unit = match[2].lower() if match else ""
    units = _UNITS.get(name, {"": 1})
    if match and unit == "x" and name in _UNITS:
        return Limit(float(match[1]), relative=True)
    if match and unit == "%" and name == "drop":
        return Limit(float(match[1]) / 100, relative=True)
    if match and unit in units:
        return Limit(float(match[1]) * units[unit])
    raise BudgetError(
        f"{name}={value!r} is not a number with a unit; try {name}={_EXAMPLES.get(name, '90')}"
    )


def _bounds(side: str, bounds: Mapping[str, float] | None) -> dict[str, float]:
    if not isinstance(bounds, Mapping | None):
        raise BudgetError(f'{side}={bounds!r} names no metric; try {side}={{"accuracy": 90}}')
    return {str(name): _limit(str(name), value).value for name, value in (bounds or {}).items()}


def _check_limit(name: str, limit: Limit) -> None:
    """Raises BudgetError for a limit that no model keeps, or that every model keeps."""
    impossible = limit.value == 0 and name != "drop"
    if not 0 <= limit.value < float("inf") or impossible:
        raise BudgetError(f"{name}={limit} can be met by no model; try {name}={_EXAMPLES[name]}")
    if name == "drop":
        return
    if limit.relative and limit.value >= 1:
        raise BudgetError(
            f"{name}={limit} allows more than the original has, so it asks for nothing; "
            f"try {name}={_EXAMPLES[name]}"
        )
    if not limit.relative and limit.value < 1 and name != "latency_ms":
        raise BudgetError(
            f"{name}={limit} is less than one, which no model meets; for a share of the original "
            f"write {name}={limit}x"
        )
