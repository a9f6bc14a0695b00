"""CP: kernels built of few terms come back, and least squares never make it worse."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.methods import run
from tersor.methods.factorize.cp import alternated, composed, cp, least_squares, links, product
from tersor.methods.targets import Target
from tersor.surgery import walk


def lots(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def target(kernel: Tensor, inputs: Tensor | None = None) -> Target:
    layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:])
    layer.weight.data = kernel.float()
    return Target("conv", walk(nn.Sequential(layer))[0], layer, kernel.double().flatten(1), inputs)


def dense(links: list[Tensor]) -> Tensor:
    first, *along, last = links
    return composed([last, first.T, *(each.T for each in along)])


@pytest.mark.parametrize("terms", [1, 2, 4])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 8, 5), (7, 3, 2, 4, 2)])
def test_a_tensor_of_few_terms_is_found_again(shape, terms):
    factors = [torch.randn(n, terms, generator=lots(n), dtype=torch.float64) for n in shape]
    tensor = composed(factors)
    tries = [alternated(tensor, terms, 300, lots(seed)) for seed in range(4)]
    errors = [float((tensor - composed(t)).square().sum() / tensor.square().sum()) for t in tries]
    assert min(errors) < 1e-8


def test_links_of_a_kernel_of_few_terms_are_exact():
    kernel = composed([torch.randn(n, 2, generator=lots(n)).double() for n in (6, 5, 3, 3)])
    found, lost = links(target(kernel), (2,), lots())
    assert torch.allclose(dense(found), kernel, atol=1e-5)
    assert lost < 1e-9


def test_the_error_never_rises_with_sweeps():
    tensor = torch.randn(6, 5, 3, 3, generator=lots()).double()
    errors = [
        float((tensor - composed(alternated(tensor, 6, sweeps, lots(1)))).square().sum())
        for sweeps in (1, 2, 4, 8, 16, 32)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    # Columns of length 1 but for the first: terms cannot grow against each other unseen.
    factors = alternated(tensor, 6, 5, lots(1))
    for factor in factors[1:]:
        assert torch.allclose(factor.norm(dim=0), torch.ones(6).double())


def test_a_term_worked_by_hand():
    # (1, 2) x (3, 4) x (1, 1): all of it in one term.
    factors = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]), torch.ones(2, 1)]
    assert composed(factors).tolist() == [[[3.0, 3.0], [4.0, 4.0]], [[6.0, 6.0], [8.0, 8.0]]]
    found = alternated(composed(factors).double(), 1, 5, lots())
    assert torch.allclose(composed(found), composed(factors).double(), atol=1e-4)


def test_equals_least_squares_written_out():
    """Kolda, Bader 2009, eq. 3.4: A = X_(1) [(C kr B)^T]^+, the product element by element."""
    tensor = torch.randn(4, 3, 5, generator=lots()).double()
    b, c = (torch.randn(n, 2, generator=lots(n)).double() for n in (3, 5))
    rows = torch.stack([b[j] * c[k] for j in range(3) for k in range(5)])
    assert torch.equal(product([b, c]), rows)
    expected = tensor.reshape(4, -1) @ torch.linalg.pinv(rows).T
    assert torch.allclose(least_squares(tensor.flatten(1), [b, c]), expected, atol=1e-4)


def test_the_last_layer_is_the_best_for_what_it_is_given():
    torch.manual_seed(0)
    kernel = torch.randn(6, 4, 3, 3).double()
    seen = torch.randn(300, 36).double() * torch.linspace(0.1, 2, 36)
    found = target(kernel, seen.T @ seen / 300)
    (first, *along, last), lost = links(found, (5,), lots())
    features = seen @ product([first.T, *(each.T for each in along)])
    wanted = seen @ found.matrix.T
    expected = torch.linalg.lstsq(features, wanted).solution.T
    error = float((wanted - features @ last.T).square().sum() / wanted.square().sum())
    best = float((wanted - features @ expected.T).square().sum() / wanted.square().sum())
    assert error == pytest.approx(best, rel=1e-3)
    assert lost == pytest.approx(best, rel=0.02)


def test_the_seed_decides_where_factors_start():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3)).eval()
    done = [
        run(net, [{"method": "factorize.cp", "options": {"generator": seed}}]) for seed in (1, 1, 2)
    ]
    weights = [each[0][0].weight for each in done]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_is_no_kernel_over_places_is_refused():
    with pytest.raises(OptionError, match="cp is for kernels over several places"):
        cp(nn.Sequential(nn.Conv2d(8, 8, 1)))
