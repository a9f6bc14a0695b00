"""Tensor trains: no more is lost than all cuts lose, and what is a train is found again."""

import math

import pytest
import torch
from torch import nn

from surgery.nets import Conv1D
from tersor.errors import OptionError
from tersor.methods import run
from tersor.methods.factoring import fill
from tersor.methods.factorize.tensor_train import (
    candidates,
    contracted,
    decomposed,
    interleaved,
    links,
    tail_energies,
    tensor_train,
)
from tersor.methods.targets import Target
from tersor.surgery import walk
from tersor.surgery.chain import chain_for


def target(outputs: int, inputs: int) -> Target:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs).double()
    return Target("fc", walk(nn.Sequential(layer))[0], layer, layer.weight.detach())


@pytest.mark.parametrize("shape", [(12, 8), (16, 16), (30, 7), (5, 1)])
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_no_more_is_lost_than_all_cuts_lose(shape, cores):
    """Oseledets 2011, theorem 2.2: the square of the error is at most the sum of those of cuts."""
    found = target(*shape)
    energy = float(found.matrix.square().sum())
    for ranks, bound in candidates(found, cores).lost.items():
        chain = chain_for(found.layer, "tensor_train", ranks)
        weights, lost = links(found, ranks)
        fill(chain, weights)
        error = float((chain.weight - found.matrix).detach().square().sum())
        assert error == pytest.approx(lost * energy, rel=1e-9, abs=1e-12)
        tensor = interleaved(found.matrix, ranks[:cores], ranks[cores : 2 * cores])
        cuts = [float(tail_energies(tensor, at)[r]) for at, r in enumerate(ranks[2 * cores :], 1)]
        assert max(cuts) - 1e-9 <= error <= min(sum(cuts), energy) + 1e-9
        assert bound == pytest.approx(min(sum(cuts), energy))


@pytest.mark.parametrize("cores", [2, 3])
def test_two_cores_lose_exactly_what_their_cut_loses_and_full_ranks_nothing(cores):
    found = target(16, 16)
    full, lost = next(iter(candidates(found, cores).lost)), []
    chain = chain_for(found.layer, "tensor_train", full)
    weights, missed = links(found, full)
    fill(chain, weights)
    assert missed < 1e-4
    if cores == 2:
        for ranks, bound in candidates(found, 2).lost.items():
            lost.append(links(found, ranks)[1] * float(found.matrix.square().sum()))
            assert lost[-1] == pytest.approx(bound, rel=1e-10, abs=1e-12)


def test_a_train_is_found_again():
    torch.manual_seed(0)
    layer = nn.Linear(12, 12, bias=False).double()
    chain = chain_for(layer, "tensor_train", (3, 2, 2, 2, 2, 3, 2, 3))
    for parameter in chain.parameters():
        nn.init.normal_(parameter)
    found = Target("fc", walk(nn.Sequential(layer))[0], layer, chain.weight.detach())
    weights, lost = links(found, chain.ranks)
    assert lost < 1e-20
    twin = chain_for(layer, "tensor_train", chain.ranks)
    fill(twin, weights)
    assert torch.allclose(twin.weight, chain.weight, atol=1e-9)


def test_a_kronecker_product_is_two_cores_of_rank_one_worked_by_hand():
    # [[1, 2], [0, 1]] x [[1, 1], [3, 0]], Van Loan's rearrangement: one outer product.
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    tensor = interleaved(torch.kron(a, b).double(), (2, 2), (2, 2))
    assert torch.equal(tensor, torch.outer(a.flatten(), b.flatten()).double())
    assert torch.allclose(contracted(list(decomposed(tensor, (1,)))), tensor)


def test_equals_the_decomposition_written_out():
    """Oseledets 2011, algorithm 1, of three dimensions, by explicit unfoldings."""
    tensor = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    u1, s1, v1 = torch.linalg.svd(tensor.reshape(4, 15), full_matrices=False)
    rest = (torch.diag(s1[:2]) @ v1[:2]).reshape(2 * 3, 5)
    u2, s2, v2 = torch.linalg.svd(rest, full_matrices=False)
    first, second, third = u1[:, :2], u2[:, :3].reshape(2, 3, 3), torch.diag(s2[:3]) @ v2[:3]
    expected = torch.zeros(4, 3, 5).double()
    for i in range(4):
        for j in range(3):
            for k in range(5):
                expected[i, j, k] = first[i] @ second[:, j] @ third[:, k]
    assert torch.allclose(contracted(list(decomposed(tensor, (2, 3)))), expected)


def test_linear_layers_of_both_layouts_become_trains():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), Conv1D(12, 16)).eval()
    done = run(net, [{"method": "factorize.tensor_train", "options": {"keep": 0.6, "cores": 3}}])
    x, outcome = torch.randn(5, 2, 24), done.recipe.steps[-1].outcome
    assert outcome["remains"] <= 0.6
    assert done(x).shape == (5, 2, 12)
    for path, found in outcome["layers"].items():
        assert math.prod(found["ranks"][:3]) == net.get_submodule(path).weight.shape[path == "0"]


def test_what_is_not_linear_is_refused():
    with pytest.raises(OptionError, match="tensor_train is for linear layers, not for Conv2d"):
        tensor_train(nn.Sequential(nn.Conv2d(8, 8, 3)))
