"""The coders in Python where they are compiled too."""

import pytest

from tersor.codec.coders import adaptive, floats, huffman, native, rans

MODULES = (adaptive, rans, huffman, floats)

compiled = pytest.mark.skipif(native.native() is None, reason="the compiled coders are not built")


def in_python(work):
    kept = [module.native for module in MODULES]
    for module in MODULES:
        module.native = lambda: None
    try:
        return work()
    finally:
        for module, found in zip(MODULES, kept, strict=True):
            module.native = found
