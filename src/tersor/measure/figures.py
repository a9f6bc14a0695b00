"""Measurements as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


class Figures:
    """Measured figures; dataclasses derive from it."""

    def as_json(self) -> dict[str, Any]:
        """The figures by name, see `plain`."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """Figures, mappings and sequences as JSON values; what is not finite becomes null."""
    if isinstance(value, Figures):
        return value.as_json()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
