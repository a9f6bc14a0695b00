"""Tucker-2: the higher-order SVD's bounds hold, and data lets outputs keep more."""

import math

import pytest
import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.methods import run
from tersor.methods.factorize.tucker import (
    best_basis,
    candidates,
    channel_moments,
    links,
    refitted,
    singular,
    spread,
    tucker,
)
from tersor.methods.targets import Target
from tersor.surgery import walk
from tersor.task import classification


def target(shape: tuple[int, ...], inputs: Tensor | None = None, rank: int | None = None) -> Target:
    torch.manual_seed(0)
    layer = {3: nn.Conv1d, 4: nn.Conv2d}[len(shape)](shape[1], shape[0], shape[2:])
    if rank is not None:
        core = torch.randn(rank, rank, *shape[2:])
        kernel = torch.einsum(
            "op,cq,pq...->oc...", *(torch.randn(n, rank) for n in shape[:2]), core
        )
        layer.weight.data = kernel
    matrix = layer.weight.detach().double().flatten(1)
    return Target("conv", walk(nn.Sequential(layer))[0], layer, matrix, inputs)


def dense(target: Target, ranks: tuple[int, int]) -> tuple[Tensor, float]:
    (first, core, last), lost = links(target, ranks)
    core = core.reshape(ranks[1], ranks[0], -1)
    return torch.einsum("op,pqk,qc->ock", last, core, first).flatten(1), lost


def tails(tensor: Tensor, side: int) -> Tensor:
    """What cutting one side's singular values off loses, with 0 to all of them."""
    values = torch.linalg.svdvals(tensor.movedim(side, 0).flatten(1)).square()
    return torch.cat([values.flip(0).cumsum(0).flip(0), torch.zeros(1).double()])


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 8, 5), (8, 3, 1, 4)])
def test_the_error_lies_between_the_bounds_of_its_cuts(shape):
    found = target(shape)
    tensor = found.matrix.reshape(*shape[:2], -1)
    energy = float(tensor.square().sum())
    outputs, inputs = tails(tensor, 0), tails(tensor, 1)
    estimated = candidates(found)
    assert estimated.energy == pytest.approx(energy)
    for (a, b), estimate in estimated.lost.items():
        weight, lost = dense(found, (a, b))
        error = float((found.matrix - weight).square().sum())
        assert error == pytest.approx(lost * energy, abs=1e-9)
        assert max(float(outputs[b]), float(inputs[a])) - 1e-9 <= error
        # De Lathauwer et al. 2000, property 10, of what sweeps only improve.
        assert error <= estimate + 1e-9
        assert estimate <= float(outputs[b] + inputs[a]) + 1e-9
    # What one channel gives in n places spans no more than n outputs.
    assert all(b <= a * math.prod(shape[2:]) for a, b in estimated.lost)


def test_full_ranks_and_kernels_of_low_rank_are_exact():
    full = target((5, 4, 3, 3))
    assert torch.allclose(dense(full, (4, 5))[0], full.matrix, atol=1e-9)
    low = target((8, 7, 3, 3), rank=2)
    weight, lost = dense(low, (2, 2))
    assert torch.allclose(weight, low.matrix, atol=1e-5)
    assert lost < 1e-10


def test_a_kernel_worked_by_hand():
    # One channel carries (1, 2) over two places, to the second output alone: basis (0, 1), (1, 0).
    tensor = torch.zeros(2, 2, 2, dtype=torch.float64)
    tensor[1, 0] = torch.tensor([1.0, 2.0])
    assert singular(tensor, 0, 1).abs().T.tolist() == [[0.0, 1.0]]
    assert best_basis(tensor, (1, 1)).abs().T.tolist() == [[1.0, 0.0]]


def test_equals_alternating_eigenvectors_written_out():
    """De Lathauwer et al. 2000, algorithm 4.2, by loops over outputs, channels and places."""
    tensor = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1)).double()
    right = torch.linalg.svd(tensor.permute(1, 0, 2).reshape(4, -1))[0][:, :2]
    for _ in range(5):
        rows = torch.stack(
            [torch.cat([tensor[o].T @ right[:, q] for q in range(2)]) for o in range(5)]
        )
        left = torch.linalg.svd(rows)[0][:, :3]
        rows = torch.stack(
            [torch.cat([left[:, p] @ tensor[:, c] for p in range(3)]) for c in range(4)]
        )
        right = torch.linalg.svd(rows.reshape(4, -1))[0][:, :2]
    found = best_basis(tensor, (2, 3))
    assert torch.allclose(found @ found.T, right @ right.T, atol=1e-8)


def test_channel_moments_are_means_over_places():
    moments = torch.arange(36.0).reshape(6, 6)
    # Channels 0 and 1 of three places each: diagonals of the four 3 x 3 blocks.
    expected = [[7.0, 10.0], [25.0, 28.0]]
    assert channel_moments(moments, 2).tolist() == expected


def test_what_follows_given_first_links_is_the_best():
    torch.manual_seed(0)
    seen = torch.randn(200, 12).double() * torch.linspace(0.1, 2, 12)
    found = target((6, 4, 3), seen.T @ seen / 200)
    first = torch.randn(2, 4).double()
    (_, core, last), lost = refitted(found, first, 2)
    reduce = torch.kron(first, torch.eye(3).double())

    def error(weight: Tensor) -> float:
        return float((seen @ (found.matrix - weight @ reduce).T).square().sum())

    best = error(last @ core)
    for _ in range(50):
        other = last + 0.05 * torch.randn_like(last), core + 0.05 * torch.randn_like(core)
        assert error(other[0] @ other[1]) > best * (1 - 1e-3)
    assert lost == pytest.approx(best / float((seen @ found.matrix.T).square().sum()), rel=0.02)


def test_data_keeps_more_of_what_is_given():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    mix = torch.randn(16, 16) / torch.arange(1, 17)[:, None]
    images = torch.einsum("ncij,cd->ndij", torch.randn(200, 16, 8, 8), mix)
    wanted = classification(calibration=images[:128])
    apart = {}
    for weigh in ("inputs", "none"):
        step = {"method": "factorize.tucker", "options": {"weigh": weigh}}
        done = run(nn.Sequential(original, nn.Flatten()), [step], wanted)
        with torch.no_grad():
            expected = original(images[128:]).flatten(1)
            apart[weigh] = float((done(images[128:]) - expected).square().mean())
    assert apart["inputs"] < 0.5 * apart["none"]


def test_ranks_are_spread_evenly():
    assert spread(3, 24) == [1, 2, 3]
    assert spread(48, 24) == list(range(2, 49, 2))


def test_what_is_no_kernel_over_places_is_refused():
    with pytest.raises(OptionError, match="tucker is for kernels over several places"):
        tucker(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(OptionError, match=r"keep=0\.01 is less than the smallest ranks"):
        tucker(nn.Sequential(nn.Conv2d(8, 8, 3)), keep=0.01)
