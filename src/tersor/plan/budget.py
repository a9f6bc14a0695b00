"""Budgets: what the compressed model may cost and must still do, as numbers that can be checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Self

from tersor.errors import BudgetError, OptionError

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
        return f"{self.value:g}x" if self.relative else f"{self.value:.12g}"


@dataclass(frozen=True)
class Budget:
    """Limits on the written file and on the model in it; None is no limit.

    size: bytes of the .tersor file; relative to the float32 safetensors file
    latency_ms: median milliseconds for the task's example batch, on `target` if one is named
    memory: peak bytes of activations for that batch
    macs: multiply-accumulates per sample of that batch
    drop: how much the headline metric may get worse, in its own unit; relative to its value
    at_least: metric name -> the value it must keep (at most, for metrics that should be low)
    target: "onnxruntime" to check latency and quality on the exported ONNX file as well
    """

    size: Limit | None = None
    latency_ms: Limit | None = None
    memory: Limit | None = None
    macs: Limit | None = None
    drop: Limit | None = None
    at_least: dict[str, float] = field(default_factory=dict)
    target: str | None = None

    def __post_init__(self) -> None:
        """Refuses budgets that nothing could meet or that ask for nothing."""
        if self.target is not None and self.target not in TARGETS:
            raise BudgetError(f"target={self.target!r} is not one of {list(TARGETS)}")
        limits = {name: getattr(self, name) for name in _UNITS}
        if not any(limits.values()) and not self.at_least:
            raise BudgetError('the budget asks for nothing; name a limit, for example "size=0.25x"')
        for name, limit in limits.items():
            if limit is None:
                continue
            if (
                not limit.value < float("inf")
                or limit.value < 0
                or (limit.value == 0 and name != "drop")
            ):
                raise BudgetError(
                    f"{name}={limit} can be met by no model; try {name}={_EXAMPLES[name]}"
                )
            if limit.relative and limit.value >= 1 and name != "drop":
                raise BudgetError(
                    f"{name}={limit} allows more than the original has, so it asks for nothing; "
                    f"try {name}={_EXAMPLES[name]}"
                )

    @classmethod
    def of(cls, budget: Budget | str | dict[str, Any]) -> Budget:
        """A budget as given: itself, a line of text, or a mapping (from a job file)."""
        if isinstance(budget, Budget):
            return budget
        if isinstance(budget, str):
            return cls.parse(budget)
        pairs = [(str(k), v) for k, v in budget.items() if k != "at_least" and v is not None]
        floors = [(f"{k}>", v) for k, v in (budget.get("at_least") or {}).items()]
        return cls._from_pairs(pairs + floors)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "size=0.15x, drop=0.5, spearman>=81.8, target=onnxruntime".

        Raises BudgetError for an unknown name, a limit given twice or a value that is no number.
        """
        pairs = []
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, sign, value = item.partition("=")
            if not sign or not name.strip() or not value.strip():
                raise BudgetError(
                    f"{item!r} in the budget {text!r} is not name=value; try size=0.15x"
                )
            pairs.append((name.strip(), value.strip()))
        return cls._from_pairs(pairs)

    @classmethod
    def _from_pairs(cls, pairs: list[tuple[str, Any]]) -> Self:
        given: dict[str, Any] = {}
        at_least: dict[str, float] = {}
        for name, value in pairs:
            if name in given or name.rstrip(">") in at_least:
                raise BudgetError(
                    f"{name.rstrip('>')} is given twice in the budget; keep one of the two"
                )
            if name.endswith(">"):
                at_least[name[:-1].strip()] = _limit("at_least", {"": 1}, value).value
            elif name == "target":
                given[name] = str(value)
            elif name in _UNITS:
                given[name] = _limit(name, _UNITS[name], value)
            else:
                raise BudgetError(
                    f"the budget knows no {name!r}; it knows {[*_UNITS, 'target']}, and floors for "
                    "metrics like accuracy>=90"
                )
        return cls(**given, at_least=at_least)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `Budget.of` reads them back."""
        out: dict[str, Any] = {
            n: str(getattr(self, n)) for n in _UNITS if getattr(self, n) is not None
        }
        if self.at_least:
            out["at_least"] = dict(self.at_least)
        if self.target:
            out["target"] = self.target
        return out

    def __str__(self) -> str:
        """As it would be typed."""
        parts = [f"{k}={v}" for k, v in self.as_json().items() if k not in ("at_least",)]
        return ", ".join([*parts, *(f"{k}>={v:g}" for k, v in self.at_least.items())])


def _limit(name: str, units: dict[str, int], value: Any) -> Limit:
    if isinstance(value, Limit):
        return value
    match = re.fullmatch(
        r"([-+]?[0-9_]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([a-zA-Z%]*)", str(value).strip()
    )
    unit = match[2].lower() if match else ""
    if match and unit == "x" and name != "at_least":
        return Limit(float(match[1]), relative=True)
    if match and unit == "%" and name == "drop":
        return Limit(float(match[1]) / 100, relative=True)
    if match and unit in units:
        return Limit(float(match[1]) * units[unit])
    raise BudgetError(
        f"{name}={value!r} is not a number with a unit; try {name}={_EXAMPLES.get(name, '90')}"
    )


def make(
    *,
    size: Any = None,
    latency_ms: Any = None,
    memory: Any = None,
    macs: Any = None,
    drop: Any = None,
    at_least: dict[str, float] | None = None,
    target: str | None = None,
) -> Budget:
    """A budget from plain values: `make(size="0.15x", drop=0.5)`."""
    raw = {
        "size": size,
        "latency_ms": latency_ms,
        "memory": memory,
        "macs": macs,
        "drop": drop,
        "target": target,
    }
    if all(v is None for v in raw.values()) and not at_least:
        raise OptionError('the budget asks for nothing; name a limit, for example size="0.25x"')
    return Budget.of({**raw, "at_least": at_least or {}})
