"""What a code will cost an entropy coder, known well enough to choose codes by.

The adaptive coders expect a magnitude from the codes around. A product of the mean magnitudes of a
code's row and column says nearly as much before any code is known, so it sorts the places of a
weight into classes, half an octave apart. How often each code occurs in a class gives its bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from tersor.forms.trellis import quantizers

Array = np.ndarray[Any, np.dtype[Any]]

CLASSES, MAGNITUDES = 32, 16
# Magnitudes beyond are told apart by quarters of an octave, in which all are taken to be as likely.
_EDGES = np.unique(np.ceil((MAGNITUDES - 1) * 2.0 ** (np.arange(4 * 28) / 4)).astype(np.int64))


def classes_of(levels: Array, states: int) -> Array:
    """(rows, columns) uint8. levels: the weight in units of its step"""
    size = np.abs(levels) / (1 if states == 1 else 2) + 1e-3
    by_row, by_column = size.mean(1, keepdims=True), size.mean(0, keepdims=True)
    expected = by_row * by_column / size.mean()
    found: Array = (2 * np.log2(expected) + 12.5).clip(0, CLASSES - 1).astype(np.uint8)
    return found


def count(weights: Iterable[tuple[Array, Array]], states: int) -> Array:
    """(2 * CLASSES, MAGNITUDES): how often each magnitude occurs for a class and a quantizer.

    weights: (codes, classes) of each weight
    """
    found: Array = np.zeros(2 * CLASSES * MAGNITUDES, np.int64)
    for codes, classes in weights:
        z = quantizers(torch.from_numpy(codes), states).numpy() if states > 1 else 0
        magnitude = np.minimum(np.abs(codes), MAGNITUDES - 1)
        place = (classes.astype(np.int64) * 2 + z) * MAGNITUDES + magnitude
        found += np.bincount(place.reshape(-1), minlength=len(found))
    return found.reshape(2 * CLASSES, MAGNITUDES)


def bits_of(counts: Array) -> Array:
    """(2 * CLASSES, MAGNITUDES) float32: bits of a code, its sign included."""
    smooth = counts + 0.3
    bits = np.log2(smooth.sum(1, keepdims=True)) - np.log2(smooth)
    bits[:, 1:] += 1
    found: Array = bits.astype(np.float32)
    return found


def estimate(weights: Iterable[tuple[Array, Array]], counts: Array) -> float:
    """Bits that all codes take together. weights: (codes, classes) of each; counts: their sum"""
    large = np.zeros(CLASSES * len(_EDGES), np.int64)
    for codes, classes in weights:
        magnitude = np.abs(codes)
        beyond = magnitude >= MAGNITUDES - 1
        place = np.searchsorted(_EDGES, magnitude[beyond], side="right") - 1
        place += classes[beyond].astype(np.int64) * len(_EDGES)
        large += np.bincount(place, minlength=len(large))
    return float((counts * bits_of(counts)).sum()) + _large_bits(large.reshape(CLASSES, -1))


def _large_bits(counts: Array) -> float:
    """Bits that say which of the large magnitudes. counts: (classes, quarters of octaves)"""
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    which = counts * (np.log2(total) - np.log2(np.maximum(counts, 1)))
    widths = np.diff(_EDGES, append=2 * _EDGES[-1])
    return float((which + counts * np.log2(widths)).sum())
