"""Updates in few bytes: what is lost is kept for later, or right on average."""

import numpy as np
import pytest
import torch

from federated.worlds import drawn
from tersor.errors import FileError, ModelError, OptionError
from tersor.federated import Packing
from tersor.federated.layout import Layout
from tersor.federated.packing import Packer, longest_body, quantized, restored, unpack

SHAPES = ((40, 30), (40,), (8, 4, 3, 3), (), (0, 5), (6,), (3,))
LAYOUT = Layout(SHAPES, 5)
PACKINGS = [
    None,
    Packing(),
    Packing(bits=2),
    Packing(bits=8, keep=0.1),
    Packing(bits=2, keep=0.01),
    Packing(bits=3, feedback=False),
]


def update(seed=0, scale=0.01):
    g = drawn(seed)
    return [torch.randn(shape, generator=g) * scale for shape in SHAPES]


@pytest.mark.parametrize("packing", PACKINGS)
def test_both_ends_know_the_same_numbers_bit_for_bit(packing):
    packer = Packer(LAYOUT, packing, drawn())
    change = update()
    body = packer.pack(change)
    found = unpack(body, LAYOUT)
    assert [tuple(tensor.shape) for tensor in found] == list(SHAPES)
    # Statistics, and everything without a packing, are exact.
    exact = range(5, 7) if packing else range(7)
    assert all(found[i].equal(change[i]) for i in exact)
    if packing and packing.feedback:
        for sent, left, wanted in zip(found, packer.residual, change, strict=False):
            assert torch.allclose(sent + left, wanted, atol=1e-8)
    assert len(body) <= longest_body(LAYOUT)


@pytest.mark.parametrize("packing", [p for p in PACKINGS if p and p.feedback])
def test_what_was_sent_and_what_is_owed_is_the_sum_of_all_updates(packing):
    packer = Packer(LAYOUT, packing, drawn())
    total = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES[:5]]
    sent = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES[:5]]
    for seed in range(20):
        change = update(seed)
        for t, s, c, f in zip(
            total, sent, change, unpack(packer.pack(change), LAYOUT), strict=False
        ):
            t += c
            s += f
    for t, s, owed in zip(total, sent, packer.residual, strict=True):
        assert torch.allclose(t, s + owed, atol=1e-5)


def test_a_case_worked_by_hand():
    # Three bits: codes -3..3. The two largest of four are kept; of 0.9 and -0.3 a step of 0.3
    # makes 3 and -1, without error.
    codes, step = quantized(torch.tensor([0.1, 0.9, -0.2, -0.3]), Packing(3, keep=0.5), drawn())
    assert codes.tolist() == [0, 3, 0, -1]
    assert step == pytest.approx(0.3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_step_has_the_least_squares_of_a_fine_search(bits):
    values = torch.randn(500, generator=drawn(bits))
    packing = Packing(bits)
    codes, step = quantized(values, packing, drawn())
    error = float((values - restored(codes, step)).square().sum())
    best = min(
        float((values - s * (values / s).round().clamp(-packing.top, packing.top)).square().sum())
        for s in np.linspace(0.02, 3, 3000)
    )
    # Against the best of 3,000 steps; eight bits are limited by the fit's few starts.
    assert error <= 1.05 * best


def test_rounding_by_chance_is_right_on_average_and_never_off_by_a_step():
    values = torch.linspace(-1, 1, 41)
    packing = Packing(3, feedback=False)
    generator = drawn()
    drawn_values = []
    for _ in range(4000):
        codes, step = quantized(values, packing, generator)
        drawn_values.append(restored(codes, step))
    found = torch.stack(drawn_values)
    assert float((found - values).abs().max()) < step
    # The mean of n draws is off by at most step / 2 / sqrt(n), one standard deviation.
    assert float((found.mean(0) - values).abs().max()) < 5 * step / 2 / 4000**0.5


def test_top_k_keeps_the_largest():
    values = torch.randn(1000, generator=drawn())
    codes, _ = quantized(values, Packing(2, keep=0.05), drawn())
    assert set(codes.nonzero().flatten().tolist()) == set(values.abs().topk(50).indices.tolist())


def test_the_entropy_coder_leaves_little_of_sparse_updates():
    layout = Layout(((300, 784),), 1)
    change = [torch.randn(300, 784, generator=drawn())]
    body = Packer(layout, Packing(2, keep=0.01), drawn()).pack(change)
    # A place among 100 takes 0.081 bits for each number, a sign 0.01.
    assert len(body) < 1.03 * 235_200 * (0.0808 + 0.01) / 8


def test_undoing_owes_again_what_was_owed():
    packer = Packer(LAYOUT, Packing(2), drawn())
    packer.pack(update(1))
    before = [tensor.clone() for tensor in packer.residual]
    packer.pack(update(2))
    packer.undo()
    assert all(a.equal(b) for a, b in zip(packer.residual, before, strict=True))


def test_the_same_seed_gives_the_same_bytes():
    for packing in PACKINGS:
        assert (
            Packer(LAYOUT, packing, drawn(5)).pack(update())
            == Packer(LAYOUT, packing, drawn(5)).pack(update())
        )  # fmt: skip


def test_an_update_that_is_not_finite_is_refused_and_owes_nothing():
    packer = Packer(LAYOUT, Packing(), drawn())
    bad = update()
    bad[1][3] = float("nan")
    with pytest.raises(ModelError, match=r"NaN .* shape \(40,\); train with a lower rate"):
        packer.pack(bad)
    assert not any(bool(tensor.any()) for tensor in packer.residual)


def test_zeros_stay_zeros():
    zeros = [torch.zeros(shape) for shape in SHAPES]
    for packing in PACKINGS:
        found = unpack(Packer(LAYOUT, packing, drawn()).pack(zeros), LAYOUT)
        assert not any(bool(tensor.any()) for tensor in found)


@pytest.mark.parametrize("packing", [None, Packing(), Packing(2, keep=0.1)])
def test_altered_bodies_are_refused_or_read_within_bounds(packing):
    body = Packer(LAYOUT, packing, drawn()).pack(update())
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        altered = bytearray(body)
        for _ in range(random.integers(1, 4)):
            altered[random.integers(len(altered))] = random.integers(256)
        cut = random.integers(2) and random.integers(1, len(altered))
        try:
            found = unpack(bytes(altered[: len(altered) - cut]), LAYOUT)
        except FileError:
            refused += 1
            continue
        assert [tuple(tensor.shape) for tensor in found] == list(SHAPES)
        assert all(bool(tensor.isfinite().all()) for tensor in found)
    assert refused > 100


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "has 0 bytes"),
        (b"\0" * 10**6, "has 1000000 bytes where"),
        (b"\x09" + bytes(100), "codes of 9 bits"),
        (b"\x01" + bytes(100), "codes of 1 bits"),
        (b"\x04" + bytes(10), "ends too early"),
        (b"\x04" + np.array([np.nan] * 5, "<f4").tobytes() + bytes(9), "not finite"),
        (b"\x04" + np.array([-1.0] * 5, "<f4").tobytes() + bytes(9), "below zero"),
    ],
)
def test_bodies_that_no_packer_writes_are_refused(body, said):
    with pytest.raises(FileError, match=said):
        unpack(body, LAYOUT)


def test_codes_beyond_their_bits_and_numbers_beyond_reason_are_refused():
    layout = Layout(((4, 4),), 1)
    body = bytearray(Packer(layout, Packing(8), drawn()).pack([torch.randn(4, 4) * 9]))
    body[0] = 3
    with pytest.raises(FileError, match="codes beyond its 3 bits"):
        unpack(bytes(body), layout)
    body[0] = 8
    body[1:5] = np.float32(3e38).tobytes()
    with pytest.raises(FileError, match="not finite, or beyond"):
        unpack(bytes(body), layout)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 1}, "bits=1 must be a whole number from 2 to 8"),
        ({"bits": 2.0}, r"bits=2\.0 must be a whole number"),
        ({"keep": 0.0}, r"keep=0\.0 must be above 0 and at most 1; try keep=1"),
        ({"keep": 1.5}, r"keep=1\.5 must be"),
        ({"keep": 0.1, "feedback": False}, r"would lose the other 90\.0% .* use feedback=True"),
    ],
)
def test_wrong_options_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        Packing(**options)
