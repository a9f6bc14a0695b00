"""Codes of a weight, column after column, each making up for the errors of those before it.

Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, eq. 2 and algorithm 1, with columns in the
order of falling energy as in its code; Nair, Suggala 2024 (CDQuant), arXiv:2406.17542, algorithm 1,
for going over the codes again; Zhang et al. 2026 (Qronos), arXiv:2505.11695, eq. 3, for a target
that is not the weight itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.forms.affine import spread

_DAMPING = 0.01
"""Share of the mean energy that is added to that of each input (GPTQ, section 3.3)."""
_BLOCK = 128


@dataclass(frozen=True)
class Levels:
    """What a weight may become: (code - zero) * scale, low <= code <= high.

    scale, zero: (outputs, groups) of the weight's float type
    group_size: inputs that share them, None for all
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int
    group_size: int | None

    def spread(self, inputs: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every input, (outputs, inputs)."""
        shape = len(self.scale), inputs
        scale, zero = (spread(p, inputs, self.group_size) for p in (self.scale, self.zero))
        return scale.expand(shape), zero.expand(shape)

    def dense(self, codes: Tensor) -> Tensor:
        """The weight that codes stand for."""
        scale, zero = self.spread(codes.shape[1])
        return (codes - zero) * scale


@dataclass(frozen=True)
class Problem:
    """Find Q with the least tr((target - Q) moments (target - Q)^T).

    target: (outputs, inputs)
    moments: (inputs, inputs), positive definite
    zeros: (outputs, inputs) bool, where Q must be zero; None for nowhere
    """

    target: Tensor
    moments: Tensor
    zeros: Tensor | None = None

    @classmethod
    def of(
        cls, matrix: Tensor, own: Tensor, cross: Tensor | None = None, zeros: Tensor | None = None
    ) -> Problem:
        """What a weight should become, for moments as in `layerwise.Moments`.

        With `cross` the target has, of all matrices, the outputs for what the layer is given now
        that are nearest to the original's. The damping stands for inputs that nobody saw, in which
        both are given the same.
        """
        energy = own.diagonal().mean()
        if not float(energy) > 0:
            return cls(matrix, torch.eye(len(own), dtype=own.dtype, device=own.device), zeros)
        extra = (_DAMPING * energy) * torch.eye(len(own), dtype=own.dtype, device=own.device)
        moments = own + extra
        if cross is not None:
            matrix = torch.linalg.solve(moments, matrix @ (cross + extra), left=False)
        return cls(matrix, moments, zeros)

    def error(self, weight: Tensor) -> Tensor:
        """Of each row, (outputs,)."""
        apart = self.target - weight
        return ((apart @ self.moments) * apart).sum(1)


def feed_forward(problem: Problem, levels: Levels, *, ordered: bool = True) -> Tensor:
    """Codes (outputs, inputs) as floats, by GPTQ.

    With the inverse of the moments = U^T U, U upper triangular, an error e at column j moves each
    later column k by -e * U_jk / U_jj. ordered: columns in the order of falling energy
    """
    order = _order(problem.moments, ordered)
    upper = _upper(problem.moments[order][:, order])
    left = problem.target[:, order].clone()
    scale, zero = (part[:, order] for part in levels.spread(left.shape[1]))
    zeros = None if problem.zeros is None else problem.zeros[:, order]
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            value = left[:, column]
            code = value / scale[:, column] + zero[:, column]
            code = code.round_().clamp_(levels.low, levels.high)
            if zeros is not None:
                code = torch.where(zeros[:, column], zero[:, column], code)
            codes[:, column] = code
            error = (value - (code - zero[:, column]) * scale[:, column]) / upper[column, column]
            errors[:, column - start] = error
            left[:, column + 1 : stop].addr_(error, upper[column, column + 1 : stop], alpha=-1)
        left[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return codes[:, order.argsort()]


def descend(problem: Problem, levels: Levels, codes: Tensor, sweeps: int) -> Tensor:
    """Goes over the codes again, each becoming the best for all others as they are.

    No code gets worse: the error falls or stays. Ends early once nothing changes.
    """
    order = _order(problem.moments, True)
    scale, zero = (part[:, order] for part in levels.spread(codes.shape[1]))
    moments = problem.moments[order][:, order]
    zeros = None if problem.zeros is None else problem.zeros[:, order]
    codes = codes[:, order].clone()
    for _ in range(sweeps):
        before = codes.clone()
        pull = (problem.target[:, order] - (codes - zero) * scale) @ moments
        for start in range(0, codes.shape[1], _BLOCK):
            stop = min(start + _BLOCK, codes.shape[1])
            moved = torch.zeros_like(codes[:, start:stop])
            for column in range(start, stop):
                now = codes[:, column]
                wanted = now + pull[:, column] / (moments[column, column] * scale[:, column])
                code = wanted.round_().clamp_(levels.low, levels.high)
                if zeros is not None:
                    code = torch.where(zeros[:, column], now, code)
                move = (code - now) * scale[:, column]
                moved[:, column - start] = move
                codes[:, column] = code
                pull[:, start:stop].addr_(move, moments[column, start:stop], alpha=-1)
            pull[:, stop:].addmm_(moved, moments[start:stop, stop:], alpha=-1)
        if torch.equal(before, codes):
            break
    return codes[:, order.argsort()]


def refit(problem: Problem, levels: Levels, codes: Tensor) -> Levels:
    """Scales for which the codes do best, the least-squares ones where they are positive."""
    groups = levels.scale.shape[1]
    apart = codes - levels.spread(codes.shape[1])[1]
    if groups == 1:
        pulled = apart @ problem.moments
        found = (pulled * problem.target).sum(1) / (pulled * apart).sum(1).clamp(min=1e-30)
        found = found[:, None]
    else:
        found = _refit_groups(problem, apart, groups, levels.group_size or apart.shape[1])
    good = (found > 0) & torch.isfinite(found)
    return replace(levels, scale=torch.where(good, found, levels.scale))


def _refit_groups(problem: Problem, apart: Tensor, groups: int, size: int) -> Tensor:
    """For every row a small system: the groups' parts of the weight against the moments."""
    outputs, inputs = apart.shape
    member = torch.arange(inputs, device=apart.device) // size
    one_hot = torch.nn.functional.one_hot(member, groups).to(apart)
    wanted = ((problem.target @ problem.moments) * apart) @ one_hot
    system = apart.new_empty(outputs, groups, groups)
    for group in range(groups):
        part = slice(group * size, min((group + 1) * size, inputs))
        pulled = apart[:, part] @ problem.moments[part]
        system[:, group] = (pulled * apart) @ one_hot
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    eye = torch.eye(groups, dtype=apart.dtype, device=apart.device)
    solved: Tensor = torch.linalg.solve(system + ridge.clamp(min=1e-30) * eye, wanted)
    return solved


def _order(moments: Tensor, ordered: bool) -> Tensor:
    if not ordered:
        return torch.arange(len(moments), device=moments.device)
    return moments.diagonal().argsort(descending=True, stable=True)


def _upper(moments: Tensor) -> Tensor:
    """U of the inverse of the moments = U^T U."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
        upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return upper
    except RuntimeError as error:
        raise ModelError(
            "what layers are given on calibration inputs is too large to work with: a mean square "
            f"of {float(moments.diagonal().mean()):.3g}; check the inputs"
        ) from error
