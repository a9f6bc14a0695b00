"""Splits of a dataset among clients that see different things.

`by_dirichlet` when one number should say how different they are; `by_shards` for the split of the
first paper, in which most clients know two classes.

Source: Hsu, Qi, Brown 2019, arXiv:1909.06335, section 3, and Yurochkin et al. 2019,
arXiv:1905.12022, section 4 (each label's samples are shared out by one draw); McMahan et al. 2017,
arXiv:1602.05629, section 3, for shards.
Differs from the papers: no client is left without samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.federated.options import check_count, check_number


def by_dirichlet(
    labels: Tensor, clients: int, *, alpha: float, generator: torch.Generator
) -> list[Tensor]:
    """Positions of each client's samples, sorted: every sample belongs to one client.

    labels: (n,) whole numbers
    alpha: above 0; at 0.1 most of a label is with one client, at 100 each has its share
    generator: draws the shares, and which samples they are

    A client that the draw leaves without samples takes one from the client with the most.
    """
    check_number("alpha", alpha, above=0.0)
    _check(labels, clients)
    labels = labels.cpu()
    seed = int(torch.randint(2**62, (), generator=generator))
    random = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in torch.unique(labels).tolist():
        places = (labels == label).nonzero().flatten()
        places = places[torch.randperm(len(places), generator=generator)]
        share = random.dirichlet(np.full(clients, alpha))
        ends = np.rint(share.cumsum() * len(places)).astype(int)
        for part, taken in zip(parts, np.split(places.numpy(), ends[:-1]), strict=True):
            part.extend(taken.tolist())
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [torch.tensor(sorted(part)) for part in parts]


def by_shards(
    labels: Tensor, clients: int, *, shards: int = 2, generator: torch.Generator
) -> list[Tensor]:
    """Positions of each client's samples: `shards` runs each of the samples sorted by label.

    labels: (n,) whole numbers
    shards: of each client, all of one size within one sample; at least 1
    generator: deals the shards out, and shuffles equal labels
    """
    check_count("shards", shards)
    _check(labels, clients * shards)
    labels = labels.cpu()
    mixed = torch.randperm(len(labels), generator=generator)
    order = mixed[labels[mixed].argsort(stable=True)]
    runs = order.tensor_split(clients * shards)
    dealt = torch.randperm(len(runs), generator=generator).reshape(clients, shards)
    return [torch.cat([runs[run] for run in hand]).sort().values for hand in dealt.tolist()]


def _check(labels: Tensor, parts: int) -> None:
    check_count("clients", parts)
    if labels.dim() != 1 or labels.is_floating_point():
        raise OptionError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} cannot be shared out; "
            "give one whole number a sample"
        )
    if len(labels) < parts:
        raise OptionError(
            f"{len(labels)} samples cannot be dealt out as {parts} parts of at least one; ask for "
            "fewer clients or shards"
        )
