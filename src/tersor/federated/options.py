"""Checks of options that several parts have: each says the value, the rule and a way out."""

from __future__ import annotations

import math

from tersor.errors import OptionError


def check_count(name: str, value: object, *, least: int = 1, most: int | None = None) -> None:
    """Raises OptionError unless `value` is a whole number from `least` to `most`."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not good or (most is not None and value > most):  # type: ignore[operator]
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise OptionError(f"{name}={value!r} must be a whole number {limit}; try {name}={least}")


def check_number(
    name: str, value: object, *, above: float = 0.0, most: float = math.inf, zero: bool = False
) -> None:
    """Raises OptionError unless `value` is a finite number above `above`, and at most `most`.

    zero: 0 is allowed, too
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not (above < value <= most or (zero and value == 0)):  # type: ignore[operator]
        floor = f"above {above:g}" if not zero else "0 or more"
        ceiling = f" and at most {most:g}" if math.isfinite(most) else ""
        way_out = most if math.isfinite(most) else above + 1
        raise OptionError(f"{name}={value!r} must be {floor}{ceiling}; try {name}={way_out:g}")
