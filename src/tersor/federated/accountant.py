"""What noise guarantees: the epsilon of Gaussian noise on sums of drawn samples, step after step.

Each step draws every sample (or client) with one probability on its own, adds up what they give,
each at most `clip` long, and adds normal noise of `noise * clip` to every number.

Source: Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3.3 (whole orders by a finite sum,
others by two series); Mironov 2017, arXiv:1702.07476, proposition 3, for epsilon; Balle et al.
2020, arXiv:1905.09982, theorem 21, for the tighter one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.federated.options import check_count, check_number

ORDERS: tuple[float, ...] = (
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    80,
    96,
    128,
    256,
    512,
)
"""Orders of the divergence that are tried; the best one counts."""
_TERMS = 2000
"""Of a series, behind its order. They fall as a power above 2, with alternating signs."""


def epsilon(noise: float, rate: float, steps: int, *, delta: float) -> float:
    """The epsilon that `steps` steps guarantee beside `delta`, by proposition 3 of Mironov 2017.

    noise: standard deviation over clip; 0 guarantees nothing (infinity)
    rate: probability that a sample is drawn in a step, 0 to 1
    delta: of a failure, above 0 and below 1; less than one over the number of samples is usual

    This is what the published figures of DP-SGD are in; `tight_epsilon` is never larger.
    """
    _check(noise, rate, steps, delta)
    spent = renyi(noise, rate, steps)
    found = (
        value - math.log(delta) / (order - 1) for order, value in zip(ORDERS, spent, strict=True)
    )
    return max(0.0, min(found))


def tight_epsilon(noise: float, rate: float, steps: int, *, delta: float) -> float:
    """As `epsilon`, by theorem 21 of Balle et al. 2020, which holds for the same noise."""
    _check(noise, rate, steps, delta)
    spent = renyi(noise, rate, steps)
    found = (
        value + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order, value in zip(ORDERS, spent, strict=True)
    )
    return max(0.0, min(found))


def renyi(noise: float, rate: float, steps: int, orders: Sequence[float] = ORDERS) -> list[float]:
    """Rényi divergence of each order, above 1: those of single steps add up."""
    return [steps * _of_step(noise, rate, order) for order in orders]


def _check(noise: float, rate: float, steps: int, delta: float) -> None:
    check_number("noise", noise, zero=True)
    check_number("rate", rate, most=1.0, zero=True)
    check_count("steps", steps, least=0)
    check_number("delta", delta, most=math.nextafter(1.0, 0.0))


def _of_step(noise: float, rate: float, order: float) -> float:
    if rate == 0:
        return 0.0
    if noise == 0:
        return math.inf
    if rate == 1:
        return order / (2 * noise**2)
    whole = float(order).is_integer()
    moment = (_whole if whole else _broken)(noise, rate, order)
    return moment / (order - 1)


def _whole(noise: float, rate: float, order: float) -> float:
    """Logarithm of E[(1 - q + q L)^order] of the likelihood ratio L, by the binomial sum."""
    k = torch.arange(order + 1, dtype=torch.float64)
    found = _power(k, order - k, noise, rate) + _log_binomials(order, len(k))
    return float(found.logsumexp(0))


def _broken(noise: float, rate: float, order: float) -> float:
    """The same by two series that meet where both parts of the mixture are equally likely."""
    k = torch.arange(math.ceil(order) + _TERMS, dtype=torch.float64)
    rest = order - k
    middle = noise**2 * math.log(1 / rate - 1) + 0.5
    below = _power(k, rest, noise, rate) + torch.special.log_ndtr((middle - k) / noise)
    above = _power(rest, k, noise, rate) + torch.special.log_ndtr((rest - middle) / noise)
    terms = torch.stack((below, above)) + _log_binomials(order, len(k))
    # Binomials of a broken order change their sign with every step behind it.
    signs = 1 - 2 * ((k - math.floor(order) - 1).clamp(min=0) % 2)
    # Where signs alternate, half of the last term stands for all that follow.
    signs[-1] /= 2
    top = terms.max()
    return float(top + (signs * (terms - top).exp()).sum().log())


def _power(many: Tensor, few: Tensor, noise: float, rate: float) -> Tensor:
    """Logarithm of q^many (1 - q)^few E[L^many]."""
    moment = (many * many - many) / (2 * noise**2)
    return many * math.log(rate) + few * math.log1p(-rate) + moment


def _log_binomials(order: float, count: int) -> Tensor:
    """Of the magnitudes of `order` over 0, 1, ..."""
    k = torch.arange(count - 1, dtype=torch.float64)
    factors = (order - k).abs().log() - (k + 1).log()
    return torch.cat((torch.zeros(1, dtype=torch.float64), factors.cumsum(0)))
