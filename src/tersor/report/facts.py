"""What a report says, drawn from its data once, so that terminal and page cannot disagree."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tersor.report import figures

Data = dict[str, Any]

# Costs of a run by their name in a budget: label, how to write them, unit.
_COSTS: dict[str, tuple[str, Callable[[float], str], str]] = {
    "macs": ("Multiply-adds", figures.count, ""),
    "latency_ms": ("Latency in torch", figures.digits, " ms"),
    "memory": ("Activations at their peak", figures.size, ""),
}


@dataclass(frozen=True)
class Fact:
    """One line of the before/after table.

    note: the change, its interval, what it was measured on
    good: whether the change is welcome; None where that is not the question
    """

    label: str
    before: str
    after: str
    note: str
    good: bool | None = None


@dataclass(frozen=True)
class Limit:
    """One constraint of the budget and how the result stands to it."""

    asked: str
    reached: str
    met: bool | None


def title(report: Data) -> str:
    """The model's name."""
    return str((report.get("model") or {}).get("name") or "model")


def verdict(report: Data) -> tuple[str, bool | None]:
    """One sentence that answers the question the budget asked."""
    budget, met = asked(report), report.get("met")
    if not budget:
        return "No budget was set.", None
    if met is None:
        return f"{budget}: not judged.", None
    return (f"{budget}: met." if met else f"{budget}: not met."), bool(met)


def asked(report: Data) -> str:
    """The budget as it is written on the command line: "size=0.15x, drop=0.5"."""
    return ", ".join(f"{name}{sign}{wanted}" for name, sign, wanted in _set(report.get("budget")))


def shrink(report: Data) -> tuple[str, str, str] | None:
    """(before, after, "6.8x smaller"), or None where the sizes are not known."""
    before, after = _bytes(report, "before"), _bytes(report, "after")
    if not before or not after:
        return None
    word = "smaller" if after <= before else "larger"
    factor = max(before, after) / min(before, after)
    return figures.size(before), figures.size(after), f"{factor:.1f}\N{MULTIPLICATION SIGN} {word}"


def facts(report: Data) -> list[Fact]:
    """The before/after table: size first, then quality, then what a run of the network costs."""
    return [*_sizes(report), *quality(report.get("comparison") or {}), *_costs(report)]


def _sizes(report: Data) -> list[Fact]:
    before, after = _bytes(report, "before"), _bytes(report, "after")
    if not before or not after:
        return []
    note = f"{figures.percent(after / before)} of the original"
    return [Fact("Size", figures.size(before), figures.size(after), note, after < before)]


def highlights(comparison: Data) -> list[Fact]:
    """What belongs beside the size: the headline metric, then how alike the answers are."""
    found = quality(comparison)
    others = len(comparison.get("metrics") or {})
    return [*found[:1], *found[others:], *found[1:others]][:3] if others else found[:3]


def quality(comparison: Data) -> list[Fact]:
    """Each metric before and after with the paired interval of its change, then the agreement."""
    rows = []
    for name, metric in (comparison.get("metrics") or {}).items():
        unit = metric.get("unit") or ""
        low, high = metric.get("low"), metric.get("high")
        note = "" if metric.get("delta") is None else figures.change(metric["delta"], unit)
        if low is not None and high is not None:
            note += f" (95 %: {figures.change(low, unit, '')} to {figures.change(high, unit, '')})"
        before, after = (_estimate(metric.get(side), unit) for side in ("before", "after"))
        rows.append(Fact(named(name), before, after, note, _welcome(metric)))
    return rows + _agreement(comparison)


def named(name: str) -> str:
    """ "calibration_error" -> "Calibration error"; abbreviations stay as they are."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _welcome(metric: Data) -> bool | None:
    """Better or worse only when the whole interval is; a change inside the noise is neither."""
    low, high = metric.get("low"), metric.get("high")
    if low is None or high is None or low <= 0 <= high:
        return None
    return (low > 0) is bool(metric.get("higher_is_better", True))


def _agreement(comparison: Data) -> list[Fact]:
    rows = []
    if comparison.get("disagreement") is not None:
        low, high = comparison.get("disagreement_low"), comparison.get("disagreement_high")
        note = ""
        if low is not None and high is not None:
            note = f"95 %: {figures.percent(low)} to {figures.percent(high)}"
        rows.append(
            Fact("Changed decisions", "", figures.percent(comparison["disagreement"]), note)
        )
    if comparison.get("cosine") is not None:
        note = "mean between the embeddings of both"
        rows.append(Fact("Cosine", "", f"{comparison['cosine']:.4f}", note))
    if comparison.get("divergence") is not None:
        unit = comparison.get("divergence_unit") or ""
        worst = comparison.get("divergence_p95")
        note = f"{unit}, mean over {comparison.get('n', 0):,} {comparison.get('on', '')} rows"
        note += "" if worst is None else f"; 95 % are below {figures.digits(worst)}"
        rows.append(Fact("Divergence", "", figures.digits(comparison["divergence"]), note))
    return rows


def _costs(report: Data) -> list[Fact]:
    costs, rows = report.get("costs") or {}, []
    parameters = (report.get("model") or {}).get("parameters")
    if parameters is not None:
        rows.append(Fact("Parameters", figures.count(parameters), "", ""))
    for key, (label, show, unit) in _COSTS.items():
        cost = costs.get(key) or {}
        if cost.get("before") and cost.get("after"):
            before, after = (f"{show(cost[side])}{unit}" for side in ("before", "after"))
            note = "per sample" if key == "macs" else _conditions(cost, costs.get("batch"))
            rows.append(Fact(label, before, after, note))
    return rows


def _conditions(cost: Data, batch: Any) -> str:
    words = [] if batch is None else [f"batch {batch}"]
    if cost.get("threads") is not None:
        words.append(f"{cost['threads']} threads" if cost["threads"] != 1 else "1 thread")
    if cost.get("p95_after") is not None:
        p95 = (figures.digits(cost[key]) for key in ("p95_before", "p95_after"))
        words.append("p95 {} and {} ms".format(*p95))
    return ", ".join(words)


def limits(report: Data) -> list[Limit]:
    """Each constraint of the budget beside what was reached, where that is in the report."""
    return [
        Limit(f"{name} {sign} {wanted}", *_reached(report, name, wanted))
        for name, sign, wanted in _set(report.get("budget"))
    ]


def _reached(report: Data, name: str, wanted: Any) -> tuple[str, bool | None]:
    measured = (report.get("comparison") or {}).get("metrics") or {}
    if name == "drop" and measured:
        return _dropped(next(iter(measured.values())), wanted)
    after = (measured.get(name) or {}).get("after")
    if isinstance(after, dict) and after.get("value") is not None:
        reached = float(after["value"])
        sign = 1 if measured[name].get("higher_is_better", True) else -1
        text = figures.value(reached, measured[name].get("unit") or "")
        return text, sign * reached >= sign * float(wanted) - _rounding(float(wanted))
    cost = (report.get("costs") or {}).get(name) or {}
    sides = [cost.get("before"), cost.get("after")]
    if name == "size":
        sides = [_bytes(report, "before"), _bytes(report, "after")]
    if not sides[0] or not sides[1]:
        return "", None
    before, after = float(sides[0]), float(sides[1])
    _, show, unit = _COSTS.get(name, ("", figures.size, ""))
    allowed = _absolute(wanted, before)
    text = f"{show(after)}{unit} = {after / before:.4f}x"
    return text, None if allowed is None else after <= allowed


def _dropped(metric: Data, wanted: Any) -> tuple[str, bool | None]:
    if metric.get("delta") is None:
        return "", None
    drop = float(metric["delta"]) * (-1 if metric.get("higher_is_better", True) else 1)
    before = (metric.get("before") or {}).get("value") or 0.0
    allowed = _absolute(wanted, abs(float(before)))
    text = figures.change(drop, metric.get("unit") or "").lstrip("+")
    return text, None if allowed is None else drop <= allowed + _rounding(float(before))


def _rounding(value: float) -> float:
    """What arithmetic may have added to a difference: a drop of exactly the limit keeps it."""
    return 1e-9 * max(1.0, abs(value))


def _absolute(wanted: Any, before: float) -> float | None:
    """ "0.15x" of `before`, or the number itself; other ways to write it stay unjudged here."""
    text = str(wanted).strip()
    try:
        return float(text[:-1]) * before if text.endswith("x") else float(text)
    except ValueError:
        return None


def _set(budget: Any) -> list[tuple[str, str, str]]:
    """("size", "=", "0.15x"), and ("accuracy", ">=", "90") for a bound."""
    given = {k: v for k, v in (budget or {}).items() if v not in (None, {}, [])}
    bounds = {">=": given.pop("at_least", {}), "<=": given.pop("at_most", {})}
    limits = [(str(k), "=", figures.plain(v)) for k, v in given.items()]
    return limits + [
        (str(k), sign, figures.plain(v)) for sign, some in bounds.items() for k, v in some.items()
    ]


def _bytes(report: Data, side: str) -> float:
    return float((report.get(side) or {}).get("bytes") or 0)


def notes(report: Data) -> list[str]:
    """Everything the run must not be silent about, each once."""
    said = [*(report.get("notes") or ()), *((report.get("comparison") or {}).get("notes") or ())]
    return list(dict.fromkeys(str(note) for note in said))


def _estimate(measured: Any, unit: str) -> str:
    if not isinstance(measured, dict):
        return "" if measured is None else figures.value(float(measured), unit)
    if measured.get("value") is None:
        return "no number"
    text = figures.value(float(measured["value"]), unit)
    span = figures.interval(measured.get("low"), measured.get("high"), unit)
    return f"{text} ({span})" if span else text
