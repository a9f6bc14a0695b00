"""Non-negative factors: no part below zero, no sweep makes it worse, and parts come back."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from surgery.nets import make
from tersor.errors import OptionError
from tersor.methods.factorize.nmf import nmf, parts
from tersor.surgery.chain import Chain


def lots(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=lots(seed), dtype=torch.float64)


def error(wanted: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    return float((wanted - factors[0] @ factors[1]).square().sum())


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5), (5, 1)])
@pytest.mark.parametrize("signed", [True, False])
def test_factors_have_no_element_of_the_wrong_sign(shape, signed):
    wanted = matrix(*shape) if signed else matrix(*shape).abs()
    left, right = parts(wanted, 3, 30)
    assert (right >= 0).all()
    above, below = (left >= 0).all(0), (left <= 0).all(0)
    assert (above | below).all()
    if not signed:
        assert above.all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_error_never_rises(signed):
    wanted = matrix(12, 10) if signed else matrix(12, 10).abs()
    errors = [error(wanted, parts(wanted, 4, sweeps)) for sweeps in range(40)]
    assert all(after <= before + 1e-9 for before, after in pairwise(errors))


def test_parts_worked_by_hand():
    # Rows 2 * (1, 0), 3 * (0, 1) and their sum: two parts, which only need naming.
    wanted = torch.tensor([[2.0, 0.0], [0.0, 3.0], [2.0, 3.0]]).double()
    left, right = parts(wanted, 2, 200)
    assert torch.allclose(left @ right, wanted, atol=1e-4)


def test_all_parts_of_all_singular_vectors_are_the_matrix():
    # Four parts each, before any sweep; the rest of the ranks stays empty.
    wanted = matrix(5, 4)
    left, right = parts(wanted, 20, 0)
    assert torch.allclose(left @ right, wanted)
    assert not left[:, 16:].any()


@pytest.mark.parametrize("seed", range(3))
def test_does_as_well_as_multiplicative_updates(seed):
    """Lee, Seung 2001, theorem 1: H *= W^T V / W^T W H, then W *= V H^T / W H H^T."""
    wanted = matrix(12, 3, seed).abs() @ matrix(3, 15, seed + 9).abs()
    w, h = (matrix(*shape, seed).abs() for shape in ((12, 3), (3, 15)))
    for _ in range(2000):
        h *= (w.T @ wanted) / (w.T @ w @ h + 1e-12)
        w *= (wanted @ h.T) / (w @ h @ h.T + 1e-12)
    found = error(wanted, parts(wanted, 3, 800))
    assert found <= error(wanted, (w, h)) * 1.05 + 1e-6 * float(wanted.square().sum())


@pytest.mark.parametrize("name", ["linear", "tied", "conv1d of gpt-2", "weight norm"])
def test_first_links_have_no_negative_weight(name):
    net, inputs = make(name)
    shape = make(name)[0](inputs).shape
    done = nmf(net, keep=0.7)
    chains = [layer for layer in done.modules() if isinstance(layer, Chain)]
    assert chains
    for chain in chains:
        assert (chain[0].weight >= 0).all()
    assert done(inputs).shape == shape


def test_what_cannot_be_factorized_is_refused():
    with pytest.raises(OptionError, match="Embedding is no layer"):
        nmf(nn.Sequential(nn.Embedding(8, 8)))
