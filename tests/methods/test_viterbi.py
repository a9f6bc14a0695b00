"""Rings of a trellis: compiled and readable search agree, and come as close as is known."""

import itertools

import numpy as np
import pytest
import torch

from tersor.codec.coders.native import native
from tersor.forms.bitshift import states, values
from tersor.methods import viterbi
from tersor.methods.viterbi import nearest_rings


def problem(rings, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rings, length, generator=generator)
    return numbers, torch.rand(rings, length, generator=generator)


def error(numbers, codes, bits, state_bits, weights=1.0):
    apart = numbers - values(states(codes, bits, state_bits))
    return float((weights * apart**2).sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("state_bits", "length"), [(8, 9), (9, 40), (11, 31), (12, 300)])
def test_the_compiled_search_and_the_readable_one_agree(bits, state_bits, length, monkeypatch):
    if native() is None:
        pytest.skip("nothing is compiled")
    numbers, weights = problem(3, length)
    fast = nearest_rings(numbers, weights, bits=bits, state_bits=state_bits)
    used = native().use_wide(False)
    plain = nearest_rings(numbers, weights, bits=bits, state_bits=state_bits)
    native().use_wide(used)
    monkeypatch.setattr(viterbi, "native", lambda: None)
    slow = nearest_rings(numbers, weights, bits=bits, state_bits=state_bits)
    assert torch.equal(fast, slow)
    assert torch.equal(plain, slow)


@pytest.mark.parametrize(("bits", "state_bits", "length"), [(1, 8, 12), (2, 8, 6), (4, 8, 3)])
def test_it_is_the_best_ring_of_those_that_close_as_it_does(bits, state_bits, length):
    numbers, weights = problem(4, length, seed=bits)
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=length)))
    ends = states(every, bits, state_bits)[:, -1] % 2 ** (state_bits - bits)
    apart = numbers[:, None] - values(states(every, bits, state_bits))
    costs = (weights[:, None] * apart**2).sum(2)
    found = nearest_rings(numbers, weights, bits=bits, state_bits=state_bits)
    for ring in range(4):
        cost = error(numbers[ring], found[ring : ring + 1], bits, state_bits, weights[ring])
        end = states(found[ring : ring + 1], bits, state_bits)[0, -1] % 2 ** (state_bits - bits)
        assert cost == pytest.approx(costs[ring][ends == end].min().item(), rel=1e-5)
        assert cost >= costs[ring].min().item() * (1 - 1e-5)


def test_threads_and_company_change_nothing():
    numbers, weights = problem(5, 64)
    together = nearest_rings(numbers, weights, bits=2, state_bits=10)
    alone = [
        nearest_rings(numbers[i : i + 1], weights[i : i + 1], bits=2, state_bits=10)
        for i in range(5)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_numbers_without_weight_are_free():
    # Only the first half counts: it comes out as well as a ring of its own, or better.
    numbers, weights = problem(8, 128)
    weights[:] = 1
    weights[:, 64:] = 0
    free = nearest_rings(numbers, weights, bits=2, state_bits=10)
    own = nearest_rings(numbers[:, :64], weights[:, :64], bits=2, state_bits=10)
    assert error(numbers, free, 2, 10, weights) < error(numbers[:, :64], own, 2, 10)


@pytest.mark.parametrize(
    ("bits", "state_bits", "most"),
    [(1, 12, 0.295), (2, 12, 0.0765), (3, 12, 0.0205), (4, 12, 0.0054)],
)
def test_short_states_come_close_to_the_bound(bits, state_bits, most):
    # Of N(0, 1), 2**(-2 * bits) is the least that any code reaches.
    numbers, _ = problem(24, 256, seed=1)
    numbers /= numbers.square().mean().sqrt()
    spread = {1: 1.0, 2: 1.0, 3: 0.95, 4: 0.9}[bits]
    codes = nearest_rings(numbers * spread, torch.ones(1, 1), bits=bits, state_bits=state_bits)
    found = error(numbers * spread, codes, bits, state_bits) / numbers.numel() / spread**2
    assert 2 ** (-2 * bits) < found < most


@pytest.mark.parametrize("length", [8, 12])
def test_rings_shorter_than_a_state_are_refused(length):
    if native() is None:
        pytest.skip("nothing is compiled")
    numbers, weights = problem(1, length)
    with pytest.raises(ValueError, match="too short"):
        nearest_rings(numbers, weights, bits=1, state_bits=16)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "most"), [(2, 0.070), (3, 0.0182), (4, 0.0047)])
def test_long_states_reach_the_published_error(bits, most):
    # QTIP, table 1: 0.069 at 2 bits with 16-bit states; separate levels reach 0.118.
    numbers, _ = problem(200, 256)
    spread = {2: 1.0, 3: 0.95, 4: 0.9}[bits]
    codes = nearest_rings(numbers * spread, torch.ones(1, 1), bits=bits, state_bits=16)
    found = error(numbers * spread, codes, bits, 16) / np.prod(numbers.shape) / spread**2
    assert found < most
