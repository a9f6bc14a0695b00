"""The compiled coders; the modules beside have the same in Python."""

from typing import Any

import numpy as np

_Array = np.ndarray[Any, np.dtype[Any]]

def use_wide(used: bool) -> bool: ...
def adaptive_encode(codes: _Array, shapes: _Array, mixed: bool) -> bytes: ...
def adaptive_decode(data: _Array, shapes: _Array, codes: _Array, mixed: bool) -> None: ...
def rans_encode(symbols: _Array, tables: _Array, frequency: _Array, table_bits: int) -> bytes: ...
def fast_decode(data: _Array, shapes: _Array, codes: _Array) -> None: ...
def huffman_bits(symbols: _Array, lengths: list[int]) -> bytes: ...
def huffman_decode(data: _Array, codes: _Array) -> None: ...
def join_floats(exponents: _Array, rest: _Array, out: _Array, center: int) -> None: ...
def search(
    levels: _Array,
    feedback: _Array,
    weights: _Array,
    row_feedback: _Array,
    row_weights: _Array,
    classes: _Array,
    bits: _Array,
    zeros: _Array,
    trellis: list[int],
    rate: float,
    codes: _Array,
    costs: _Array,
    threads: int,
) -> None: ...
