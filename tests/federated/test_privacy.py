"""Epsilons are the published ones, and what they are computed for is what is done."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from federated.worlds import blobs, drawn, net, normed, tasks, trained
from tersor.errors import ModelError, OptionError, TaskError
from tersor.federated import Local, Packing, Privacy, PrivateLocal, epsilon, tight_epsilon
from tersor.federated.accountant import ORDERS, renyi
from tersor.federated.layout import length
from tersor.federated.privacy import _normal, _uniform, clipped, per_sample, private_mean
from tersor.task import classification


@pytest.mark.parametrize(
    ("noise", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.0), (0.7, 45, 7.1)]
)
def test_the_published_figures_of_mnist_come_out(noise, epochs, published):
    # TF-Privacy's tutorial: 60,000 images, batches of 256, delta 1e-5.
    found = epsilon(noise, 256 / 60_000, epochs * 60_000 // 256, delta=1e-5)
    assert found == pytest.approx(published, rel=0.02)
    assert tight_epsilon(noise, 256 / 60_000, epochs * 60_000 // 256, delta=1e-5) < found


def integrated(noise, rate, order):
    """The divergence by adding up the integral: E over N(0, noise^2) of the ratio's power."""
    z = np.linspace(-60 * noise, 60 * noise + order, 400_001)
    density = np.exp(-(z**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    ratio = 1 - rate + rate * np.exp((2 * z - 1) / (2 * noise**2))
    log = np.log(density, where=density > 0, out=np.full_like(z, -np.inf)) + order * np.log(ratio)
    top = log.max()
    return (top + math.log(np.exp(log - top).sum() * (z[1] - z[0]))) / (order - 1)


@pytest.mark.parametrize("noise", [0.7, 1.3, 4.0])
@pytest.mark.parametrize("rate", [0.004, 0.1, 0.6])
@pytest.mark.parametrize("order", [1.1, 1.5, 2, 2.7, 5.5, 10.9, 16])
def test_divergences_are_those_of_the_integral(noise, rate, order):
    (found,) = renyi(noise, rate, 1, [order])
    assert found == pytest.approx(integrated(noise, rate, order), rel=1e-4, abs=1e-9)


def test_whole_orders_lie_between_the_broken_ones_beside_them():
    low, whole, high = renyi(1.1, 0.01, 1, [2.999, 3, 3.001])
    assert low < whole < high
    assert high - low < 0.01 * whole


def test_known_ends():
    # All drawn: one Gaussian, order / (2 noise^2). None drawn: nothing is told.
    assert renyi(2.0, 1.0, 3, [4]) == [pytest.approx(3 * 4 / 8)]
    assert renyi(2.0, 0.0, 3, [4]) == [0.0]
    assert epsilon(0.0, 0.1, 1, delta=1e-5) == math.inf
    assert epsilon(1.0, 0.1, 0, delta=1e-5) < 0.1
    found = [epsilon(1.0, rate, 10, delta=1e-5) for rate in (0.01, 0.1, 0.5, 1.0)]
    assert found == sorted(found)
    assert max(ORDERS) == 512


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: epsilon(-1, 0.1, 1, delta=0.1), "noise=-1 must be 0 or more"),
        (lambda: epsilon(1, 1.1, 1, delta=0.1), r"rate=1\.1 must be"),
        (lambda: epsilon(1, 0.1, -1, delta=0.1), "steps=-1 must be"),
        (lambda: tight_epsilon(1, 0.1, 1, delta=0), "delta=0 must be above 0"),
        (lambda: epsilon(1, 0.1, 1, delta=1), "delta=1 must be"),
        (lambda: Privacy(clip=0, noise=1), "clip=0 must be above 0"),
        (lambda: Privacy(clip=1, noise=math.nan), "noise=nan must be"),
        (lambda: PrivateLocal(steps=0), "steps=0"),
        (lambda: PrivateLocal(steps=1, rows=0), "rows=0"),
        (lambda: PrivateLocal(steps=1, rows=99).epsilon(50, 1), "rows=99 of the 50 samples"),
    ],
)
def test_wrong_use_is_refused(call, said):
    with pytest.raises(OptionError, match=said):
        call()


def test_no_change_is_longer_than_the_clip_and_short_ones_stay():
    for scale in (1e-3, 1.0, 1e6):
        change = [torch.randn(30, 20, generator=drawn()) * scale, torch.randn(7) * scale]
        found = clipped(change, 2.5)
        assert length(found) <= 2.5
        share = min(1.0, 2.5 / length(change))
        assert torch.allclose(found[0], change[0] * share, rtol=1e-5)
    assert length(clipped([torch.zeros(3)], 1.0)) == 0


def test_the_noise_is_what_the_accountant_is_told():
    privacy = Privacy(clip=3.0, noise=0.5)
    shapes = [(100, 500)]
    found = private_mean([], privacy, shapes=shapes, expected=4, generator=drawn())
    # noise * clip / expected = 0.375; of 50,000 draws the deviation is known to 0.3 %.
    assert float(found[0].std()) == pytest.approx(0.375, rel=0.015)
    change = [torch.full((100, 500), 1.0)]
    twice = private_mean([change, change], privacy, shapes=shapes, expected=4, generator=drawn())
    apart = [a - b for a, b in zip(twice, found, strict=True)]
    assert length(apart) == pytest.approx(2 * 3.0 / 4, rel=1e-3)


def test_each_client_is_drawn_on_its_own():
    _, done = trained(fraction=0.5, rounds=40, protection=Privacy(clip=1.0, noise=0.01))
    counts = [len(result.chosen) for result in done.rounds]
    assert {0, 1, 4} & set(counts)
    assert 2.0 < sum(counts) / 40 < 3.0
    assert done.epsilon == epsilon(0.01, 0.5, 40, delta=1e-5)


def test_private_rounds_are_the_algorithm_written_out():
    privacy = Privacy(clip=0.05, noise=0.1)
    model, _ = trained(rounds=1, protection=privacy, up=Packing(8))
    generator = drawn(2)
    torch.rand(5, generator=generator)
    noise = [torch.randn(p.shape, generator=generator) * 0.1 * 0.05 for p in net().parameters()]
    start = net()
    # Clipped changes of all five sum to at most 5 * 0.05; the noise is known, so the rest shows.
    rest = [
        (p - s) * 5 - n
        for p, s, n in zip(model.parameters(), start.parameters(), noise, strict=True)
    ]
    assert 0.05 < length([r.detach() for r in rest]) <= 5 * 0.05 * 1.001


def test_it_learns_under_little_noise_and_not_under_much():
    _, little = trained(rounds=8, protection=Privacy(clip=2.0, noise=0.01))
    assert little.rounds[-1].judged > 0.8
    _, much = trained(rounds=8, protection=Privacy(clip=2.0, noise=1000.0))
    # A random network may be right by luck in one round, and not in all.
    assert sum(result.judged for result in much.rounds) / 8 < 0.65
    assert much.epsilon < 1 < little.epsilon


def test_gradients_of_single_samples_are_those_of_a_loop():
    x, y = blobs(12)
    task = classification(train=(x, y))
    model = net()
    found = per_sample(model, task, x, y)
    for i in range(12):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for gradient, p in zip(found, model.parameters(), strict=True):
            assert torch.allclose(gradient[i], p.grad, atol=1e-6)


def test_private_descent_is_the_algorithm_written_out():
    x, y = blobs(30)
    task = classification(train=(x, y), batch_size=10)
    settings = PrivateLocal(steps=2, rate=0.5, rows=6, clip=0.3, noise=0.2, secret=False)
    model, twin = net(), net()
    settings(model, task, drawn(3))

    generator = drawn(3)
    for _ in range(2):
        total = [torch.randn(p.shape, generator=generator) * 0.06 for p in twin.parameters()]
        chances = torch.rand(30, generator=generator)
        for i in (i for i in range(30) if chances[i] < 0.2):
            twin.zero_grad()
            nn.functional.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]).backward()
            size = float(sum(p.grad.square().sum() for p in twin.parameters()).sqrt())
            for t, p in zip(total, twin.parameters(), strict=True):
                t += p.grad * min(1.0, 0.3 / size)
        with torch.no_grad():
            for t, p in zip(total, twin.parameters(), strict=True):
                p -= 0.5 / 6 * t
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_private_descent_learns_and_knows_its_epsilon():
    settings = PrivateLocal(steps=10, rate=0.5, rows=16, noise=0.5, secret=False)
    _, done = trained(rounds=6, trainer=settings)
    assert done.rounds[-1].judged > 0.8
    assert done.epsilon is None
    assert settings.epsilon(48, 6) == epsilon(0.5, 16 / 48, 60, delta=1e-5)


def test_nobody_can_draw_the_noise_of_a_client_again():
    # A server that knows the seed, or asks for the same round twice, would take it off.
    task = classification(train=blobs(30))
    settings = PrivateLocal(steps=1, rows=6, noise=1.0)
    first, second, repeated = net(), net(), [net(), net()]
    settings(first, task, drawn(3))
    settings(second, task, drawn(3))
    assert not torch.equal(first[0].weight, second[0].weight)
    for model in repeated:
        replace(settings, secret=False)(model, task, drawn(3))
    assert torch.equal(repeated[0][0].weight, repeated[1][0].weight)


def test_noise_of_random_bytes_is_normal():
    found = _normal((401, 500)).double().flatten()
    assert found.dtype == torch.float64
    assert len(found) == 401 * 500
    # Four standard errors each.
    assert abs(float(found.mean())) < 4 / 447
    assert float(found.std()) == pytest.approx(1, abs=4 / 633)
    for value in (-1.5, 0.0, 0.7, 2.0):
        wanted = 0.5 * (1 + math.erf(value / math.sqrt(2)))
        assert float((found < value).double().mean()) == pytest.approx(wanted, abs=4 * 0.5 / 447)
    # Both halves come of the same pairs, and are independent all the same.
    first, second = found.chunk(2)
    assert abs(float((first * second).mean())) < 4 / 316
    uniform = _uniform(100_000)
    assert 0 <= float(uniform.min()) < 1e-3 < 0.999 < float(uniform.max()) < 1


def test_networks_that_mix_samples_and_tasks_without_rows_are_refused():
    x, y = blobs(12)
    with pytest.raises(ModelError, match="replace batch norms by group norms"):
        per_sample(normed().train(), classification(train=(x, y)), x, y)
    task = classification(train=(x, y))
    task.kind = "language"
    uneven = [(torch.rand(4, 2), torch.zeros(4).long()), (torch.rand(4, 3), torch.zeros(4).long())]
    with pytest.raises(TaskError, match="pad them to one length"):
        PrivateLocal(steps=1, rows=2)(net(), classification(train=uneven), drawn())
    with pytest.raises(TaskError, match="use Privacy, which protects clients"):
        per_sample(net(), task, x, y)


def test_momentum_begins_anew_each_round():
    task = tasks()[0]
    first, second = net(), net()
    settings = Local(rate=0.05, momentum=0.9)
    settings(first, task, drawn())
    settings(second, task, drawn())
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
