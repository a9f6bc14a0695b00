"""Exporting a hundred times: the exporter's table of operators is read once for all tests."""

import functools
import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_table():
    """torch parses the sources of 500 operators anew for every file, more than half of its time."""
    if importlib.util.find_spec("onnxscript") is None:
        yield
        return
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    with pytest.MonkeyPatch.context() as patch:
        read = functools.cache(onnxscript_apis.get_torchlib_ops)
        # The name under which torch finds it, whatever module it lies in.
        patch.setattr(onnxscript_apis, "get_torchlib_ops", read)
        yield
