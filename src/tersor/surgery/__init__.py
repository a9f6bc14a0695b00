"""What one may do to a module: hold a weight as a form, walk its weights, fold, see it decoded."""

from tersor.surgery.fold import Folded, fold
from tersor.surgery.hold import decoded, form_of, held, hold, release, release_all
from tersor.surgery.walk import Site, check_finite, in_execution_order, plain_copy, walk

__all__ = [
    "Folded",
    "Site",
    "check_finite",
    "decoded",
    "fold",
    "form_of",
    "held",
    "hold",
    "in_execution_order",
    "plain_copy",
    "release",
    "release_all",
    "walk",
]
