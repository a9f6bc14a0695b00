"""Codes of a weight, column after column, each making up for the errors of those before it.

Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, eq. 2 and algorithm 1, with columns in the
order of falling energy as in its code; Nair, Suggala 2024 (CDQuant), arXiv:2406.17542, algorithm 1,
for going over the codes again; Zhang et al. 2026 (Qronos), arXiv:2505.11695, eq. 3, for a target
that is not the weight itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.forms.affine import spread
from tersor.methods.moments import Metric

_BLOCK = 128
_AT_ONCE = 2**22
"""Elements of a weight that are looked at together, which bounds the memory beside the moments."""


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

    def nearest(self, weight: Tensor, zeros: Tensor | None = None) -> Tensor:
        """Codes (outputs, inputs) of the levels nearest to a weight; of 0 where it must be zero."""
        scale, zero = self.spread(weight.shape[1])
        codes = (weight / scale + zero).round_().clamp_(self.low, self.high)
        return codes if zeros is None else torch.where(zeros, zero, codes)


@dataclass(frozen=True)
class Problem:
    """Find Q for which target - Q costs least.

    target: (outputs, inputs)
    metric: of errors
    zeros: (outputs, inputs) bool, where Q must be zero; None for nowhere
    """

    target: Tensor
    metric: Metric
    zeros: Tensor | None = None

    @classmethod
    def of(
        cls, matrix: Tensor, own: Tensor, cross: Tensor | None = None, zeros: Tensor | None = None
    ) -> Problem:
        """What a weight should become, for moments as in `Moments`.

        With `cross` the target has, of all matrices, the outputs for what the layer is given now
        that are nearest to the original's. In the inputs that nobody saw both are given the same.
        """
        metric = Metric.damped(own)
        if cross is not None and metric.extra:
            matrix = metric.solve((matrix @ cross).add_(matrix, alpha=metric.extra))
        return cls(matrix, metric, zeros)

    def error(self, weight: Tensor) -> Tensor:
        """Of each row, (outputs,)."""
        return self.metric.of(self.target - weight)

    def split(self, group_size: int | None) -> Iterator[Problem]:
        """The same for a few rows at a time. group_size: of the levels to come"""
        inputs = self.target.shape[1]
        # Scales of many groups take more than the weight, see `Rounding.refit`.
        groups = -(-inputs // (group_size or inputs))
        rows = max(1, _AT_ONCE // max(inputs, groups**2))
        for start in range(0, len(self.target), rows):
            few = slice(start, start + rows)
            zeros = None if self.zeros is None else self.zeros[few]
            yield Problem(self.target[few], self.metric, zeros)


class Rounding:
    """Rows of a weight on their way to codes.

    Inside, inputs stand first: what is computed together then lies together in memory.
    """

    def __init__(self, problem: Problem, levels: Levels) -> None:
        self._metric, self._levels = problem.metric, levels
        self._target = problem.target.T.contiguous()
        self._zeros = None if problem.zeros is None else problem.zeros.T.contiguous()
        self._size = levels.group_size or len(self._target)
        self._member = torch.arange(len(self._target), device=self._target.device) // self._size
        self._scale, self._zero = levels.scale.T.contiguous(), levels.zero.T.contiguous()
        self._codes = torch.zeros_like(self._target)
        # Moments times target, and times target - Q: what a small change of each value would gain.
        self._wish: Tensor | None = None
        self._pull: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """(outputs, inputs) as floats."""
        return self._codes.T

    @property
    def levels(self) -> Levels:
        """What they stand for."""
        return replace(self._levels, scale=self._scale.T.contiguous())

    def start(self, codes: Tensor) -> None:
        """Takes codes (outputs, inputs) from elsewhere."""
        self._codes, self._pull = codes.T.clone(), None

    def feed_forward(self) -> None:
        """Chooses all codes, by GPTQ. Inputs are in the order of rising energy, the last first."""
        lower, _ = self._metric.factors
        order: list[int] = self._metric.order.tolist()
        left, self._pull = self._target[self._metric.order], None
        for stop in range(len(left), 0, -_BLOCK):
            start = max(0, stop - _BLOCK)
            errors = torch.empty_like(left[start:stop])
            for at in reversed(range(start, stop)):
                column = order[at]
                code = self._nearest(column, left[at])
                self._codes[column] = code
                error = self._target[column] - self._value(column, code)
                errors[at - start] = error
                left[start:at].addr_(lower[at, start:at], error)
            left[:start].addmm_(lower[start:stop, :start].T, errors)

    def descend(self, sweeps: int) -> None:
        """Goes over the codes again, each becoming the best for all others as they are.

        No row gets worse: its error falls or stays. Ends early once nothing changes.
        """
        pull, energies = self._pulled(), self._metric.energies.tolist()
        for _ in range(sweeps):
            changed = False
            for start in range(0, len(pull), _BLOCK):
                stop = min(start + _BLOCK, len(pull))
                within, moved = self._metric.block(start, stop), torch.zeros_like(pull[start:stop])
                for column in range(start, stop):
                    value = self._value(column, self._codes[column])
                    code = self._nearest(column, value + pull[column] / energies[column])
                    move = self._value(column, code) - value
                    moved[column - start] = move
                    self._codes[column] = code
                    pull[start:stop].addr_(within[column - start], move, alpha=-1)
                if bool(moved.any()):
                    changed = True
                    rows = self._metric.own[start:stop]
                    pull[:start].addmm_(rows[:, :start].T, moved, alpha=-1)
                    pull[stop:].addmm_(rows[:, stop:].T, moved, alpha=-1)
            if not changed:
                break

    def refit(self) -> None:
        """Takes the least-squares scales for the codes, as they are stored.

        A row keeps its own where the new ones, once rounded, would be worse.
        """
        apart = self._apart()
        if self._wish is None:
            self._wish = self._metric.times(self._target)
        wanted = self._by_group(apart * self._wish).T
        system, pulled = self._system(apart)
        ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        eye = torch.eye(len(self._scale), dtype=system.dtype, device=system.device)
        found = torch.linalg.solve(system + ridge[:, None, None] * eye, wanted)
        found = found.to(torch.bfloat16).to(found.dtype)
        before = self._scale.T
        found = torch.where((found > 0) & torch.isfinite(found), found, before)

        def cost(scale: Tensor) -> Tensor:
            return ((torch.einsum("ogh,oh->og", system, scale) - 2 * wanted) * scale).sum(1)

        better = cost(found) < cost(before)
        self._scale = torch.where(better[:, None], found, before).T.contiguous()
        self._pull = None if pulled is None else self._wish - pulled * self._scale

    def _system(self, apart: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of every row (groups, groups): what two groups with scales of 1 cost together.

        And the moments times `apart`, where there is one group.
        """
        groups = len(self._scale)
        if groups == 1:
            pulled = self._metric.times(apart)
            return (pulled * apart).sum(0)[:, None, None], pulled
        system = apart.new_empty(apart.shape[1], groups, groups)
        for group in range(groups):
            part = slice(group * self._size, (group + 1) * self._size)
            pulled = self._metric.own[:, part] @ apart[part]
            pulled[part].add_(apart[part], alpha=self._metric.extra)
            system[:, group] = self._by_group(pulled.mul_(apart)).T
        return system, None

    def _by_group(self, values: Tensor) -> Tensor:
        """Sums of (inputs, outputs) over the inputs of each group, (groups, outputs)."""
        return values.new_zeros(len(self._scale), values.shape[1]).index_add_(
            0, self._member, values
        )

    def _apart(self) -> Tensor:
        """The codes without their zero points."""
        return self._codes - self._zero[self._member]

    def _pulled(self) -> Tensor:
        if self._pull is None:
            value = self._apart().mul_(self._scale[self._member])
            self._pull = self._metric.times(value.neg_().add_(self._target))
        return self._pull

    def _nearest(self, column: int, value: Tensor) -> Tensor:
        group, found = column // self._size, self._levels
        code = (value / self._scale[group]).add_(self._zero[group])
        code.round_().clamp_(found.low, found.high)
        if self._zeros is None:
            return code
        return torch.where(self._zeros[column], self._zero[group], code)

    def _value(self, column: int, code: Tensor) -> Tensor:
        group = column // self._size
        return (code - self._zero[group]).mul_(self._scale[group])
