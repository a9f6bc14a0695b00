"""Search for the codes of a weight: least distortion and rate along a trellis, errors fed forward.

Every state keeps the path that reached it together with the errors of that path, so each path is
judged by what its errors do to the columns after them (per-survivor processing).

Source: Fischer, Wang 1992, "Entropy-constrained trellis-coded quantization", IEEE Trans.
Information Theory 38(2), for the cost; Raheli, Polydoros, Tzou 1995, "Per-survivor processing",
IEEE Trans. Communications 43(2/3/4); errors are fed along columns as by Frantar et al. 2022 (GPTQ),
arXiv:2210.17323, eq. 2, and across rows as by Tseng et al. 2025 (YAQA), arXiv:2505.22988.
Differs: all three at once. With one state and no rate it is GPTQ without its ordering of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tersor.codec.coders.native import native
from tersor.forms.trellis import TAPS, following, points_of

Floats = np.ndarray[Any, np.dtype[np.float32]]
Codes = np.ndarray[Any, np.dtype[np.int32]]
Classes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Terms:
    """What makes one code better than another.

    weights: (columns,) of a squared error, in units of the step squared
    feedback: (columns, columns), row j says how far an error of 1 in column i < j moves column j;
        None where errors stay where they are
    row_weights, row_feedback: the same for rows, (rows,) and (rows, rows)
    bits: (2 * classes, magnitudes) float32, of a code of class c, quantizer z and magnitude m in
        [2 * c + z, m]; beyond the last it grows by 2 log2
    rate: what one bit costs, in units of a weighted squared error
    """

    weights: Floats
    feedback: Floats | None
    row_weights: Floats
    row_feedback: Floats | None
    bits: Floats
    rate: float


def search(
    levels: Floats, classes: Classes, terms: Terms, *, states: int, zeros: Classes | None = None
) -> tuple[Codes, np.ndarray[Any, np.dtype[np.float64]]]:
    """The codes (rows, columns), and the cost of each row.

    levels: (rows, columns), the weight in units of its step
    classes: (rows, columns), which of the tables in `terms.bits` a code belongs to
    zeros: (rows, columns), not 0 where only 0 is allowed
    """
    compiled = native()
    if compiled is None:
        return search_slowly(levels, classes, terms, states=states, zeros=zeros)
    codes = np.empty(levels.shape, np.int32)
    costs = np.empty(len(levels), np.float64)
    compiled.search(
        np.ascontiguousarray(levels, np.float32),
        _square(terms.feedback),
        np.ascontiguousarray(terms.weights, np.float32),
        _square(terms.row_feedback),
        np.ascontiguousarray(terms.row_weights, np.float32),
        np.ascontiguousarray(classes, np.uint8),
        np.ascontiguousarray(terms.bits, np.float32),
        np.empty((0, 0), np.uint8) if zeros is None else np.ascontiguousarray(zeros, np.uint8),
        [states, *TAPS[states]],
        float(terms.rate),
        codes.reshape(-1),
        costs,
        torch.get_num_threads(),
    )
    return codes, costs


def search_slowly(
    levels: Floats, classes: Classes, terms: Terms, *, states: int, zeros: Classes | None = None
) -> tuple[Codes, np.ndarray[Any, np.dtype[np.float64]]]:
    """The same, row by row and state by state."""
    codes = np.empty(levels.shape, np.int32)
    costs = np.empty(len(levels), np.float64)
    errors = np.zeros(levels.shape)
    for row, own in enumerate(levels.astype(np.float64)):
        moved = own
        if terms.row_feedback is not None:
            moved = own - terms.row_feedback[row, :row] @ errors[:row]
        only = np.zeros(levels.shape[1], np.uint8) if zeros is None else zeros[row]
        weights = terms.weights * terms.row_weights[row]
        best = _best_path(moved, classes[row], only, weights, terms, states)
        codes[row], costs[row] = best
        errors[row] = moved - points_of(torch.from_numpy(codes[row : row + 1]), states).numpy()[0]
    return codes, costs


@dataclass(frozen=True)
class _Path:
    cost: float
    codes: list[int]
    errors: list[float]


def _best_path(
    levels: Any, classes: Classes, zeros: Classes, weights: Floats, terms: Terms, states: int
) -> tuple[list[int], float]:
    paths = {0: _Path(0.0, [], [])}
    for column, level in enumerate(levels):
        following_paths: dict[int, _Path] = {}
        for state, path in sorted(paths.items()):
            moved = float(level)
            if terms.feedback is not None:
                moved -= float(np.dot(terms.feedback[column, :column], path.errors))
            z = state & 1 if states > 1 else 0
            bits = terms.bits[2 * int(classes[column]) + z]
            for code in _candidates(abs(moved), z, states, bool(zeros[column])):
                point = 2 * code - (z if code else 0) if states > 1 else code
                error = abs(moved) - point
                cost = path.cost + float(weights[column]) * error**2
                cost += terms.rate * _rate(bits, code)
                to = following(state, code & 1, states) if states > 1 else 0
                if to not in following_paths or cost < following_paths[to].cost:
                    sign = -1 if moved < 0 else 1
                    following_paths[to] = _Path(
                        cost, [*path.codes, sign * code], [*path.errors, sign * error]
                    )
        paths = following_paths
    best = min(sorted(paths.items()), key=lambda item: item[1].cost)[1]
    return best.codes, best.cost


def _candidates(size: float, z: int, states: int, zero: bool) -> list[int]:
    if zero:
        return [0]
    below = int((min(size, 1e9) + z) / 2) if states > 1 else int(min(size, 1e9))
    found = list(range(max(0, below - 2), below + 2))
    return [*found, 0] if below > 2 else found


def _rate(bits: Floats, code: int) -> float:
    last = len(bits) - 1
    return float(bits[min(code, last)]) + (
        2 * float(np.log2(code - last + 1)) if code > last else 0
    )


def _square(matrix: Floats | None) -> Floats:
    if matrix is None:
        return np.empty((0, 0), np.float32)
    return np.ascontiguousarray(matrix, np.float32)
