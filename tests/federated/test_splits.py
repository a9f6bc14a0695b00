"""Each sample goes to one client, and how alike the clients are follows one number."""

import pytest
import torch

from federated.worlds import drawn
from tersor.errors import OptionError
from tersor.federated import by_dirichlet, by_shards

LABELS = torch.arange(600) % 10


def tables(parts):
    return torch.stack([LABELS[part].bincount(minlength=10) for part in parts])


@pytest.mark.parametrize("alpha", [0.05, 0.5, 5.0, 1000.0])
@pytest.mark.parametrize("clients", [1, 3, 40])
def test_every_sample_belongs_to_one_client(alpha, clients):
    parts = by_dirichlet(LABELS, clients, alpha=alpha, generator=drawn())
    assert torch.cat(parts).sort().values.equal(torch.arange(600))
    assert len(parts) == clients
    assert min(len(part) for part in parts) >= 1


def test_a_small_alpha_makes_clients_different_and_a_large_one_alike():
    def largest_share(alpha):
        found = tables(by_dirichlet(LABELS, 6, alpha=alpha, generator=drawn()))
        return float((found.amax(0) / found.sum(0)).mean())

    # Of six clients, each has a sixth of a label where all are alike.
    assert largest_share(0.05) > 0.8
    assert largest_share(1e4) < 0.2


def test_the_dirichlet_split_is_the_one_written_out():
    import numpy as np

    generator = drawn(4)
    random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    wanted = [[] for _ in range(3)]
    for label in range(10):
        places = [i for i in range(600) if LABELS[i] == label]
        order = torch.randperm(60, generator=generator)
        cuts = [0, *np.rint(np.cumsum(random.dirichlet([0.7] * 3)) * 60).astype(int).tolist()]
        for client in range(3):
            wanted[client] += [places[order[i]] for i in range(cuts[client], cuts[client + 1])]
    found = by_dirichlet(LABELS, 3, alpha=0.7, generator=drawn(4))
    assert [part.tolist() for part in found] == [sorted(part) for part in wanted]


def test_two_shards_hold_few_labels_and_equally_many_samples():
    parts = by_shards(LABELS, 10, shards=2, generator=drawn())
    assert torch.cat(parts).sort().values.equal(torch.arange(600))
    assert {len(part) for part in parts} == {60}
    # 20 shards of 30 samples, and a label has 60: no shard holds two labels.
    assert int((tables(parts) > 0).sum(1).max()) <= 2


def test_the_same_seed_splits_alike():
    for split in (lambda g: by_dirichlet(LABELS, 4, alpha=0.3, generator=g),
                  lambda g: by_shards(LABELS, 4, generator=g)):  # fmt: skip
        first, second, other = split(drawn(1)), split(drawn(1)), split(drawn(2))
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))
        assert not all(a.equal(b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: by_dirichlet(LABELS, 3, alpha=0, generator=drawn()), "alpha=0 must be above 0"),
        (lambda: by_dirichlet(LABELS, 0, alpha=1, generator=drawn()), "clients=0 must be a whole"),
        (lambda: by_shards(LABELS, 400, generator=drawn()), "600 samples .* as 800 parts"),
        (lambda: by_shards(LABELS, 4, shards=0, generator=drawn()), "shards=0 must be"),
        (lambda: by_shards(LABELS.float(), 4, generator=drawn()), "one whole number a sample"),
    ],
)
def test_what_cannot_be_split_is_refused(call, said):
    with pytest.raises(OptionError, match=said):
        call()
