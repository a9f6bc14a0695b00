"""Hard-concrete gates: drawn as the paper says, and open as often as it says."""

import math

import pytest
import torch

from tersor.forms import Bitmask, HardConcrete


def gate_of_the_paper(openness: float, noise: float | None) -> float:
    """Louizos et al. 2018, eqs. 10 and 11 with noise, eq. 13 without."""
    beta, gamma, zeta = 2 / 3, -0.1, 1.1
    inner = openness
    if noise is not None:
        inner = (math.log(noise) - math.log(1 - noise) + openness) / beta
    stretched = (zeta - gamma) / (1 + math.exp(-inner)) + gamma
    return min(1.0, max(0.0, stretched))


def form(shape: tuple[int, ...], axis: int | None, seed: int = 0) -> HardConcrete:
    generator = torch.Generator().manual_seed(seed)
    made = HardConcrete.encode(
        torch.randn(shape, generator=generator), start=0.0, axis=axis, generator=generator
    )
    made.openness.data += 2 * torch.randn(made.openness.shape, generator=generator)
    made.noise = torch.rand(made.openness.shape, generator=generator)
    return made


@pytest.mark.parametrize(
    ("shape", "axis", "gates"),
    [((4, 5), None, (4, 5)), ((4, 5), 0, (4, 1)), ((4, 5), 1, (1, 5)), ((3, 2, 2), 0, (3, 1, 1))],
)
def test_gates_are_those_of_the_paper(shape, axis, gates):
    made = form(shape, axis)
    assert made.openness.shape == gates
    noisy = made.dense()
    with torch.no_grad():
        plain = made.dense()
    openness = made.openness.expand(shape).flatten().tolist()
    noise = made.noise.expand(shape).flatten().tolist()
    latents = made.latent.flatten().tolist()
    for at, latent in enumerate(latents):
        drawn = gate_of_the_paper(openness[at], noise[at])
        assert noisy.flatten()[at].item() == pytest.approx(latent * drawn, abs=1e-5)
        tested = gate_of_the_paper(openness[at], None)
        assert plain.flatten()[at].item() == pytest.approx(latent * tested, abs=1e-5)


@pytest.mark.parametrize("openness", [-3.0, -1.6, 0.0, 2.2])
def test_the_chance_of_being_open_is_that_of_sampling(openness):
    # 40,000 draws: a standard deviation of at most 0.0025.
    made = HardConcrete(torch.ones(200, 200), torch.full((200, 200), openness))
    made.noise = torch.rand(200, 200, generator=torch.Generator().manual_seed(0))
    sampled = float((made.gates() != 0).float().mean())
    assert made.chance().mean().item() == pytest.approx(sampled, abs=0.01)


def test_the_gradient_of_the_penalty_is_that_of_the_chance():
    made = HardConcrete(torch.ones(1, 1), torch.zeros(1, 1))
    made.chance().sum().backward()
    chance = 1 / (1 + math.exp((2 / 3) * math.log(0.1 / 1.1)))
    assert made.openness.grad.item() == pytest.approx(chance * (1 - chance), rel=1e-5)


def test_freezing_changes_nothing():
    made = form((6, 7), None)
    frozen = made.freeze()
    assert isinstance(frozen, Bitmask)
    with torch.no_grad():
        assert torch.equal(frozen.dense(), made.dense())
    assert made.stored_bits() == 2 * 6 * 7 * 32
