"""Simulated workers: beside loops written out, and what they refuse."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from tersor.errors import OptionError
from tersor.task import classification
from tersor.train import Labels, Lesson, Training
from tersor.train.distributed import (
    DiLoCo,
    Portion,
    PowerSGD,
    TopK,
    Uncompressed,
    simulate,
    simulate_local,
)
from tersor.train.lessons import part_of

FLAT = Training(schedule="constant", warmup=0.0, clip=1e9)


def blobs(n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds in the plane."""
    labels = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
    return centres[labels] + torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), labels


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))


def lessons() -> Labels:
    return Labels(classification(train=blobs(), batch_size=32))


def loss_of(model):
    return lambda lesson: functional.cross_entropy(model(lesson.inputs), lesson.targets)


def simulated(model, compressor, *, epochs=2, workers=4, training=FLAT):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return simulate(
        model,
        optimizer,
        lessons(),
        loss_of(model),
        compressor=compressor,
        workers=workers,
        epochs=epochs,
        generator=torch.Generator().manual_seed(1),
        training=training,
    )


def same(one: nn.Module, other: nn.Module, tolerance: float) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=tolerance) for a, b in pairs)


def test_uncompressed_workers_do_what_one_does_with_the_whole_batch():
    model, twin = net(), net()
    done = simulated(model, Uncompressed())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for inputs, labels, *_ in lessons().epoch(generator):
            optimizer.zero_grad()
            functional.cross_entropy(twin(inputs), labels).backward()
            optimizer.step()
    assert same(model, twin, 1e-5)
    # 6 steps; (2 * 16 + 16) + (16 * 3 + 3) = 99 values of 4 bytes.
    assert done.traffic.sent == done.traffic.plain == 6 * 4 * 99
    assert len(done.losses) == 6


def test_compressed_workers_learn_the_same_task_in_fewer_bytes():
    losses = {}
    for name, compressor in (("plain", Uncompressed()), ("topk", TopK(0.1))):
        done = simulated(net(), compressor, epochs=20)
        losses[name] = sum(done.losses[-3:]) / 3
    assert done.traffic.saved > 5
    assert losses["topk"] < losses["plain"] + 0.05


def test_a_simulation_leaves_the_given_compressor_alone_and_repeats_itself():
    compressor, found = PowerSGD(1), []
    for _ in range(2):
        model = net()
        simulated(model, compressor)
        found.append(model[0].weight)
    assert torch.equal(*found)
    assert compressor.kept == []


def local(model, settings, *, workers=3, epochs=2, rate=0.01):
    return simulate_local(
        model,
        lambda: torch.optim.AdamW(model.parameters(), lr=rate),
        lessons(),
        loss_of(model),
        settings,
        workers=workers,
        epochs=epochs,
        generator=torch.Generator().manual_seed(1),
        training=FLAT,
    )


def test_diloco_is_algorithm_1_written_out():
    # 8 steps in all: rounds of 3, 3 and 2.
    model, every, workers = net(), 3, 3
    start = copy.deepcopy(model)
    batches = lessons()
    generator = torch.Generator().manual_seed(1)
    steps = [lesson for _ in range(3) for lesson in batches.epoch(generator)][:9]

    theta = [p.detach().clone() for p in start.parameters()]
    velocity = [torch.zeros_like(t) for t in theta]
    replicas = [copy.deepcopy(start) for _ in range(workers)]
    inner = [torch.optim.AdamW(replica.parameters(), lr=0.01) for replica in replicas]
    for first in range(0, len(steps), every):
        for rank, (replica, optimizer) in enumerate(zip(replicas, inner, strict=True)):
            with torch.no_grad():
                for p, t in zip(replica.parameters(), theta, strict=True):
                    p.copy_(t)
            for lesson in steps[first : first + every]:
                inputs, labels, *_ = part_of(lesson, rank, workers)
                optimizer.zero_grad()
                functional.cross_entropy(replica(inputs), labels).backward()
                optimizer.step()
        for at, columns in enumerate(zip(*(r.parameters() for r in replicas), strict=True)):
            delta = sum(theta[at] - p.detach() for p in columns) / workers
            velocity[at] = 0.9 * velocity[at] + delta
            theta[at] = theta[at] - 0.7 * (delta + 0.9 * velocity[at])

    done = local(model, DiLoCo(every=3), epochs=3)
    for found, wanted in zip(model.parameters(), theta, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    assert (done.traffic.sent, done.traffic.plain) == (3 * 4 * 99, 9 * 4 * 99)
    assert len(done.losses) == 9


def test_the_last_round_is_as_short_as_what_is_left():
    done = local(net(), DiLoCo(every=4), epochs=2)
    assert done.traffic.sent == 2 * 4 * 99
    assert len(done.losses) == 6


def test_an_outer_step_of_rate_1_takes_the_mean_of_the_weights():
    # One worker, so the mean is its own weights: as if it had trained alone.
    model, twin = net(), net()
    local(model, DiLoCo(every=2, rate=1.0, momentum=0.0), workers=1)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for lesson in lessons().epoch(generator):
            optimizer.zero_grad()
            loss_of(twin)(lesson).backward()
            optimizer.step()
    assert same(model, twin, 1e-5)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_each_worker_sees_its_own_batches_alone():
    model, twins = normed(), [normed() for _ in range(4)]
    done = simulated(model, Uncompressed(), epochs=1)
    optimizers = [torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9) for twin in twins]
    for lesson in lessons().epoch(torch.Generator().manual_seed(1)):
        for rank, twin in enumerate(twins):
            twin.zero_grad()
            loss_of(twin)(part_of(lesson, rank, 4)).backward()
        for column in zip(*(twin.parameters() for twin in twins), strict=True):
            mean = torch.stack([parameter.grad for parameter in column]).mean(0)
            for parameter in column:
                parameter.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    spread = torch.stack([twin[1].running_var for twin in twins])
    assert not torch.allclose(spread[0], spread[1])
    assert torch.allclose(model[1].running_var, spread.mean(0), atol=1e-6)
    assert int(model[1].num_batches_tracked) == 3
    # As doubles, behind the epoch.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert done.traffic.sent == 3 * 4 * parameters + 2 * 8 * 8


def test_parts_are_the_batch_once_each():
    lesson = Lesson(torch.arange(7), torch.arange(7))
    parts = [part_of(lesson, rank, 3) for rank in range(3)]
    assert torch.cat([part.inputs for part in parts]).tolist() == list(range(7))
    assert [len(part.targets) for part in parts] == [2, 2, 3]


def test_pairs_and_tokens_stay_with_their_samples():
    # Two rows for one target, as pairs of sentences; three for one, as answers by token.
    pairs = part_of(Lesson(torch.arange(8), torch.arange(4)), 1, 2)
    assert (pairs.inputs.tolist(), pairs.targets.tolist()) == ([4, 5, 6, 7], [2, 3])
    unlabelled = part_of(Lesson(torch.arange(10)), 1, 2, each=2)
    assert unlabelled.inputs.tolist() == [4, 5, 6, 7, 8, 9]
    tokens = part_of(Lesson({"ids": torch.arange(4)}, answer=torch.arange(12)), 0, 2)
    assert tokens.inputs["ids"].tolist() == [0, 1]
    assert (tokens.targets, tokens.answer.tolist()) == (None, [0, 1, 2, 3, 4, 5])


def test_a_batch_smaller_than_the_team_goes_to_each_whole():
    assert part_of(Lesson(torch.arange(2), torch.arange(2)), 2, 3).inputs.tolist() == [0, 1]


def test_a_portion_is_lessons_of_one_rank():
    whole = list(lessons().epoch(torch.Generator().manual_seed(3)))
    portions = [Portion(lessons(), rank, 2) for rank in range(2)]
    halves = [list(p.epoch(torch.Generator().manual_seed(3))) for p in portions]
    for both, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat([part.inputs for part in parts]), both.inputs)
    assert len(portions[0]) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiLoCo(every=0), "every=0 must be a whole number of at least 1"),
        (lambda: DiLoCo(rate=0.0), "rate=0.0 of the outer step must be above 0"),
        (lambda: DiLoCo(momentum=1.0), "momentum=1.0 must be at least 0 and below 1"),
        (lambda: Portion(lessons(), 2, 2), "rank=2 of workers=2 must be from 0"),
        (lambda: simulated(net(), TopK(), workers=0), "workers=0 must be a whole number"),
        (lambda: simulated(net(), TopK(), training=Training(ema=0.9)), "ema=0.9"),
    ],
)
def test_wrong_use_is_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()
