"""PowerSGD: gradients as products of two thin matrices, by one step of a power iteration.

The first to try: two all-reduces of thin matrices, the same cost on 2 workers and on 200. Matrices
without low-rank structure are served better by `TopK`.

Source: Vogels, Karimireddy, Jaggi 2019, arXiv:1905.13727, algorithm 1, and algorithm 2 for error
feedback.
Differs from the paper: a matrix that two factors would not make smaller is sent as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.task.data import check_count
from tersor.train.distributed.compressor import Compressor
from tersor.train.distributed.exchange import Talk, mean


class PowerSGD(Compressor):
    """M ~ P Q^T for each gradient M (rows, columns), a weight's first dimension being its rows.

    A step sends rank * (rows + columns) float32 values for a matrix; vectors are sent as they are.

    rank: columns of P (rows, rank) and of Q (columns, rank), at least 1; 1 to 4 is usual
    feedback: see `Compressor`
    seed: of the first Q, the same on every worker
    """

    def __init__(self, rank: int = 2, *, feedback: bool = True, seed: int = 0) -> None:
        super().__init__(feedback=feedback)
        self._rank, self._seed = check_count(rank, "rank"), seed
        self._right: dict[int, Tensor] = {}

    def _exchange(self, wanted: list[Tensor]) -> Talk[tuple[list[Tensor], list[Tensor]]]:
        matrices = {
            place: tensor.reshape(len(tensor), -1)
            for place, tensor in enumerate(wanted)
            if self._thins(tensor)
        }
        rest = [tensor for place, tensor in enumerate(wanted) if place not in matrices]
        # P and what is sent as it is share the first all-reduce.
        left = [matrix @ self._warm(place, matrix) for place, matrix in matrices.items()]
        answer = yield from mean([*left, *rest])
        left = [torch.linalg.qr(one).Q for one in answer[: len(left)]]
        right = [m.T @ p for m, p in zip(matrices.values(), left, strict=True)]
        means = (yield from mean(right)) if right else []
        self._right = dict(zip(matrices, means, strict=True))

        sent, averaged = list(wanted), list(wanted)
        whole = iter(answer[len(left) :])
        for place in range(len(wanted)):
            if place not in matrices:
                averaged[place] = next(whole)
        for place, p, own, common in zip(matrices, left, right, means, strict=True):
            sent[place] = (p @ own.T).view_as(wanted[place])
            averaged[place] = (p @ common.T).view_as(wanted[place])
        return sent, averaged

    def state(self) -> dict[str, Any]:
        """With the Q to start from."""
        return {**super().state(), "right": self._right}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        super().restore(state)
        self._right = dict(state["right"])

    def _thins(self, tensor: Tensor) -> bool:
        if tensor.dim() < 2:
            return False
        rows, columns = len(tensor), tensor.numel() // max(1, len(tensor))
        return self._rank * (rows + columns) < rows * columns

    def _warm(self, place: int, matrix: Tensor) -> Tensor:
        """Q of the step before; of the first step, drawn at random."""
        if place not in self._right:
            generator = torch.Generator().manual_seed(self._seed + place)
            drawn = torch.randn(matrix.shape[1], self._rank, generator=generator)
            self._right[place] = drawn
        return self._right[place].to(matrix.device)
