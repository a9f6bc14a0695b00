"""Numbers as people read them."""

import math
from typing import Any


def size(count: float) -> str:
    """1_086_000 -> "1.09 MB": decimal units, three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return f"{digits(count / factor)} {unit}"
    return f"{count:.0f} bytes"


def count(number: float) -> str:
    """568_740_352 -> "569 M"; small counts stay exact."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 10 * factor or (abs(number) >= factor and unit != "k"):
            return f"{digits(number / factor)} {unit}"
    return f"{number:,.0f}"


def digits(number: float) -> str:
    """Three significant digits, without an exponent where it can be helped."""
    if not math.isfinite(number) or number == 0:
        return f"{number:.0f}"
    magnitude = math.floor(math.log10(abs(number)))
    if magnitude < -4 or magnitude > 6:
        return f"{number:.2e}"
    return f"{number:.{max(0, 2 - magnitude)}f}"


def power(number: float) -> str:
    """Two digits and an exponent, for columns to compare: "1.2e-4"."""
    if not math.isfinite(number) or number == 0:
        return f"{number:.0f}"
    digit, _, exponent = f"{number:.1e}".partition("e")
    return f"{digit}e{int(exponent)}"


def value(number: float, unit: str) -> str:
    """A metric: 91.64 with two decimals, smaller scales with four."""
    text = f"{number:.2f}" if unit == "points" or abs(number) >= 10 else f"{number:.4f}"
    return text if unit in ("", "points") else f"{text} {unit}"


def change(number: float, unit: str, shown: str | None = None) -> str:
    """A difference with its sign and its unit: "-0.20 points".

    shown: what to write for the unit, where that is not its name
    """
    places = 2 if unit == "points" or abs(number) >= 10 else 4
    # Adding zero turns a negative zero into a plain one.
    text = f"{round(number, places) + 0.0:+.{places}f}"
    text = f"{text} {unit if shown is None else shown}".rstrip()
    return text.replace("-", "\N{MINUS SIGN}")


def percent(fraction: float) -> str:
    """0.0213 -> "2.1 %", 0.148 -> "14.8 %"."""
    return f"{100 * fraction:.1f} %" if abs(fraction) < 0.9995 else f"{100 * fraction:.0f} %"


def interval(low: Any, high: Any, unit: str) -> str:
    """ "89.90 to 93.31", or nothing where no interval was measured."""
    if low is None or high is None:
        return ""
    return f"{value(low, unit)} to {value(high, unit)}"


def plain(option: Any) -> str:
    """An option of a recipe, a shape or a limit as text."""
    if isinstance(option, dict):
        return ", ".join(f"{key}={plain(item)}" for key, item in option.items())
    if isinstance(option, list | tuple):
        return "[" + ", ".join(plain(item) for item in option) + "]"
    return str(option)


def options(given: dict[str, Any]) -> str:
    """The options of a step that say something: what is None was not asked for."""
    return plain({name: value for name, value in given.items() if value is not None})


def shape(sizes: Any) -> str:
    """[16, 3, 3, 3] -> "16x3x3x3" with proper multiplication signs."""
    return "\N{MULTIPLICATION SIGN}".join(str(n) for n in sizes or ())
