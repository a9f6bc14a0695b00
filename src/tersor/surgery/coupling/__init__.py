"""Coupling: which slices of which weights can only be cut together."""

from tersor.surgery.coupling.graph import Coupling, Group, Place, Unit, couple, shapes, steps
from tersor.surgery.coupling.labels import Labelled

__all__ = ["Coupling", "Group", "Labelled", "Place", "Unit", "couple", "shapes", "steps"]
