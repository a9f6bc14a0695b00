"""The compiled coders, where they were built."""

import os
import warnings
from functools import cache
from types import ModuleType


@cache
def native() -> ModuleType | None:
    """The extension, or None after saying once that everything is slower without it."""
    if os.environ.get("TERSOR_NO_NATIVE"):
        return None
    try:
        from tersor.codec.coders import _native
    except ImportError as error:
        warnings.warn(
            f"tersor's compiled coders are not available ({error}); files are read and written "
            "the same, but up to 1000 times slower. Install a C++ compiler and tersor again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _native
