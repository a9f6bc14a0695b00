"""Compressors: each beside its paper written out, the bytes it sends, and what it keeps."""

import math

import pytest
import torch

from tersor.errors import OptionError
from tersor.train.distributed import (
    COMPRESSORS,
    DGC,
    Int8,
    PowerSGD,
    RandomK,
    Sign,
    TopK,
    Uncompressed,
    in_one_process,
)
from tersor.train.distributed.packing import pack_places, unpack_places, width_of

SHAPES = [(12, 9), (9,), (6, 4, 3, 3), (1,), ()]
FEEDBACK = {
    "powersgd": lambda: PowerSGD(2),
    "topk": lambda: TopK(0.05),
    "randomk": lambda: RandomK(0.05),
    "sign": Sign,
    "int8": Int8,
}


def drawn(seed: int, workers: int = 3, shapes=SHAPES) -> list[list[torch.Tensor]]:
    """Gradients of each worker."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator) for s in shapes] for _ in range(workers)]


def averaged(team, gradients):
    """What the first worker got, after checking that all got the same, and bytes sent."""
    talks = [one.average(own) for one, own in zip(team, gradients, strict=True)]
    results, sent = in_one_process(talks)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0], sent


def close(found, wanted, tolerance=1e-5):
    return all(torch.allclose(a, b, atol=tolerance) for a, b in zip(found, wanted, strict=True))


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", FEEDBACK)
def test_what_is_sent_and_what_is_kept_are_the_gradient_and_what_was_kept_before(name):
    one = FEEDBACK[name]()
    before = [torch.zeros(shape) for shape in SHAPES]
    for seed in range(5):
        gradients = drawn(seed, workers=1)
        # Alone, what comes back is what the worker sent.
        sent, _ = averaged([one], gradients)
        whole = [g + k for g, k in zip(gradients[0], before, strict=True)]
        assert close([s + k for s, k in zip(sent, one.kept, strict=True)], whole)
        before = one.kept


@pytest.mark.parametrize("name", FEEDBACK)
def test_nothing_is_lost_over_many_steps_and_workers(name):
    team = [FEEDBACK[name]() for _ in range(3)]
    total = [torch.zeros(shape) for shape in SHAPES]
    given = [torch.zeros(shape) for shape in SHAPES]
    for seed in range(6):
        gradients = drawn(seed)
        found, _ = averaged(team, gradients)
        total = [t + f for t, f in zip(total, found, strict=True)]
        given = [t + g for t, g in zip(given, mean(gradients), strict=True)]
    kept = mean([one.kept for one in team])
    assert close([t + k for t, k in zip(total, kept, strict=True)], given)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_averages_have_the_shapes_and_the_type_of_the_gradients(name):
    team = [COMPRESSORS[name]() for _ in range(2)]
    gradients = [[g.bfloat16() for g in own] for own in drawn(0, workers=2)]
    found, _ = averaged(team, gradients)
    assert [f.shape for f in found] == [g.shape for g in gradients[0]]
    assert {f.dtype for f in found} == {torch.bfloat16}
    assert all(f.isfinite().all() for f in found)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_zero_gradients_stay_zero(name):
    team = [COMPRESSORS[name]() for _ in range(2)]
    for _ in range(2):
        found, _ = averaged(team, [[torch.zeros(s) for s in SHAPES] for _ in team])
        assert all((f == 0).all() for f in found)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_restored_compressor_goes_on_as_if_nothing_had_been(name):
    team, twins = ([COMPRESSORS[name]() for _ in range(2)] for _ in range(2))
    for seed in range(3):
        averaged(team, drawn(seed, workers=2))
    for one, twin in zip(team, twins, strict=True):
        twin.restore(one.state())
    wanted, _ = averaged(team, drawn(9, workers=2))
    found, _ = averaged(twins, drawn(9, workers=2))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_an_overflow_is_told_to_all_and_leaves_no_trace(name, bad):
    team, twins = ([COMPRESSORS[name]() for _ in range(2)] for _ in range(2))
    for seed in range(2):
        averaged(team, drawn(seed, workers=2))
        averaged(twins, drawn(seed, workers=2))
    overflown = drawn(2, workers=2)
    overflown[1][2][0, 0] = bad
    results, _ = in_one_process(
        [one.average(own) for one, own in zip(team, overflown, strict=True)]
    )
    assert all(any(not part.isfinite().all() for part in found) for found in results)
    wanted, _ = averaged(twins, drawn(3, workers=2))
    found, _ = averaged(team, drawn(3, workers=2))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_without_compression_it_is_the_mean():
    found, sent = averaged([Uncompressed() for _ in range(3)], drawn(0))
    assert close(found, mean(drawn(0)), 1e-6)
    assert sent == 4 * sum(math.prod(shape) for shape in SHAPES)


def orthogonal(columns: torch.Tensor) -> torch.Tensor:
    """Gram and Schmidt, one column after another."""
    done: list[torch.Tensor] = []
    for column in columns.T:
        for other in done:
            column = column - (other @ column) * other
        done.append(column / column.norm())
    return torch.stack(done, 1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_powersgd_is_algorithm_1_with_the_feedback_of_algorithm_2(rank):
    team = [PowerSGD(rank, seed=5) for _ in range(3)]
    right = torch.randn(9, rank, generator=torch.Generator().manual_seed(5))
    errors = [torch.zeros(12, 9) for _ in team]
    for seed in range(4):
        gradients = drawn(seed, shapes=[(12, 9)])
        deltas = [own[0] + error for own, error in zip(gradients, errors, strict=True)]
        left = orthogonal(sum(delta @ right for delta in deltas) / 3)
        rights = [delta.T @ left for delta in deltas]
        errors = [d - left @ q.T for d, q in zip(deltas, rights, strict=True)]
        right = sum(rights) / 3
        found, _ = averaged(team, gradients)
        assert torch.allclose(found[0], left @ right.T, atol=1e-4)
        for one, error in zip(team, errors, strict=True):
            assert torch.allclose(one.kept[0], error, atol=1e-4)


def test_powersgd_finds_a_gradient_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    found, sent = averaged([PowerSGD(2), PowerSGD(2)], [[low], [low]])
    assert torch.allclose(found[0], low, atol=1e-4)
    # Two factors of float32: 2 * (20 + 30) values.
    assert sent == 400


def test_powersgd_sends_what_factors_would_not_make_smaller():
    # 3 * 4 values are fewer than 2 * (3 + 4), and a vector has no rank.
    found, sent = averaged([PowerSGD(2)], [[torch.ones(3, 4), torch.ones(5)]])
    assert sent == 4 * (12 + 5)
    assert close(found, [torch.ones(3, 4), torch.ones(5)], 0)


@pytest.mark.parametrize("feedback", [True, False])
def test_topk_is_its_definition_written_out(feedback):
    team = [TopK(0.1, feedback=feedback) for _ in range(3)]
    errors = [torch.zeros(108) for _ in team]
    for seed in range(4):
        gradients = drawn(seed, shapes=[(12, 9)])
        chosen = []
        for worker, own in enumerate(gradients):
            whole = own[0].flatten() + errors[worker]
            ranked = sorted(range(108), key=lambda at: -abs(float(whole[at])))
            sent = torch.zeros(108)
            # ceil(0.1 * 108) = 11
            for at in ranked[:11]:
                sent[at] = whole[at]
            chosen.append(sent)
            errors[worker] = whole - sent if feedback else torch.zeros(108)
        found, sent_bytes = averaged(team, gradients)
        assert torch.allclose(found[0].flatten(), sum(chosen) / 3, atol=1e-6)
        # 11 values, and 11 places below 108 in a byte each.
        assert sent_bytes == 11 * (4 + 1)


def test_randomk_takes_the_same_places_on_every_worker_and_others_next_time():
    team = [RandomK(0.25) for _ in range(3)]
    seen = []
    for seed in range(2):
        before = [one.kept or [torch.zeros(12, 9)] for one in team]
        gradients = drawn(seed, shapes=[(12, 9)])
        found, sent = averaged(team, gradients)
        places = found[0] != 0
        assert (int(places.sum()), sent) == (27, 108)
        whole = mean([[g[0] + k[0]] for g, k in zip(gradients, before, strict=True)])[0]
        assert torch.allclose(found[0], whole * places, atol=1e-6)
        for one in team:
            assert (one.kept[0][places] == 0).all()
        seen.append(places)
    assert not torch.equal(*seen)


def test_sign_is_the_algorithm_of_its_paper():
    one, error = Sign(), torch.zeros(108)
    for seed in range(4):
        own = drawn(seed, workers=1, shapes=[(12, 9)])
        p = own[0][0].flatten() + error
        step = sum(abs(float(v)) for v in p) / 108 * p.sign()
        error = p - step
        found, sent = averaged([one], own)
        assert torch.allclose(found[0].flatten(), step, atol=1e-5)
        assert torch.allclose(one.kept[0].flatten(), error, atol=1e-5)
        # 108 bits are 13.5 bytes; a scale is 4.
        assert sent == 14 + 4


def test_signs_of_workers_by_hand():
    # Means of magnitudes: 2 and 1. (2 - 1) / 2, (-2 - 1) / 2, (2 + 1) / 2
    gradients = [[torch.tensor([1.0, -3.0, 2.0])], [torch.tensor([-1.0, -1.0, 1.0])]]
    team = [Sign(), Sign()]
    found, _ = averaged(team, gradients)
    assert found[0].tolist() == [0.5, -1.5, 1.5]
    assert team[0].kept[0].tolist() == [-1.0, -1.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_int8_is_off_by_half_a_step_at_most(seed):
    gradients = drawn(seed, workers=1)
    found, sent = averaged([Int8()], gradients)
    for value, gradient in zip(found, gradients[0], strict=True):
        step = gradient.abs().max() / 127
        assert (value - gradient).abs().max() <= step / 2 + 1e-6
        assert torch.equal(value, (gradient / step).round() * step)
    assert sent == sum(math.prod(shape) + 4 for shape in SHAPES)


def test_dgc_is_algorithm_4_written_out():
    momentum, clip = 0.9, 5.0
    team = [DGC(0.1, momentum=momentum, clip=clip) for _ in range(3)]
    shapes = [(12, 9), (9,)]
    u, v = ([[torch.zeros(s) for s in shapes] for _ in team] for _ in range(2))
    for seed in range(5):
        gradients, sent = drawn(seed, shapes=shapes), []
        for worker, own in enumerate(gradients):
            length = math.sqrt(sum(float((g**2).sum()) for g in own))
            sent.append([])
            for layer, gradient in enumerate(own):
                clipped = gradient * min(1.0, clip / length)
                u[worker][layer] = momentum * u[worker][layer] + clipped
                v[worker][layer] = v[worker][layer] + u[worker][layer]
                k = math.ceil(0.1 * gradient.numel())
                threshold = v[worker][layer].abs().flatten().sort(descending=True).values[k - 1]
                mask = v[worker][layer].abs() >= threshold
                sent[-1].append(v[worker][layer] * mask)
                v[worker][layer] = v[worker][layer] * ~mask
                u[worker][layer] = u[worker][layer] * ~mask
        found, _ = averaged(team, gradients)
        assert close(found, mean(sent))
        for worker, one in enumerate(team):
            assert close(one.kept, v[worker])


def test_dgc_that_sends_all_without_momentum_is_the_mean():
    team = [DGC(1.0, momentum=0.0) for _ in range(3)]
    for seed in range(2):
        assert close(averaged(team, drawn(seed))[0], mean(drawn(seed)), 1e-6)


def test_dgc_warms_up_by_quarters():
    one, shares = DGC(0.001, warmup=8), []
    for seed in range(9):
        shares.append(one.share)
        averaged([one], drawn(seed, workers=1))
    assert shares == [1 / 4, 1 / 4, 1 / 16, 1 / 16, 1 / 64, 1 / 64, 1 / 256, 1 / 256, 0.001]


@pytest.mark.parametrize(("size", "width"), [(1, 1), (256, 1), (257, 2), (65536, 2), (65537, 3)])
def test_places_take_the_fewest_bytes_that_hold_them(size, width):
    places = torch.tensor([0, size // 2, size - 1])
    packed = pack_places(places, size)
    assert width_of(size) == width
    assert packed.shape == (3, width)
    assert torch.equal(unpack_places(packed), places)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerSGD(0), "rank=0 must be a whole number of at least 1"),
        (lambda: PowerSGD(1.5), "rank=1.5"),
        (lambda: TopK(0.0), "share=0.0 must be above 0 and at most 1"),
        (lambda: TopK(1.5), "share=1.5"),
        (lambda: RandomK(-0.1), "share=-0.1"),
        (lambda: DGC(2.0), "share=2.0"),
        (lambda: DGC(momentum=1.0), "momentum=1.0 must be at least 0 and below 1"),
        (lambda: DGC(clip=0.0), "clip=0.0 must be above 0; None does not clip"),
        (lambda: DGC(warmup=-1), "warmup=-1 steps"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_other_tensors_than_the_step_before_are_refused():
    one = TopK(0.1)
    averaged([one], drawn(0, workers=1))
    with pytest.raises(
        OptionError, match=r"gradients: 1 tensors .* before had 5 .* new compressor"
    ):
        averaged([one], drawn(0, workers=1, shapes=[(3,)]))


def test_workers_with_different_tensors_are_refused():
    gradients = [[torch.ones(3), torch.ones(3)], [torch.ones(3)]]
    with pytest.raises(OptionError, match="differ in number"):
        averaged([Uncompressed(), Uncompressed()], gradients)


def test_no_gradients_and_sparse_ones_are_refused():
    with pytest.raises(OptionError, match="at least one"):
        averaged([Sign()], [[]])
    with pytest.raises(OptionError, match="sparse=False"):
        averaged([Sign()], [[torch.eye(3).to_sparse()]])
