import itertools

import pytest
import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.forms import Trellis
from tersor.forms.trellis import TAPS, following, quantizers

STATES = sorted(TAPS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def walked(codes: list[int], states: int) -> list[int]:
    """The points of one row, state by state."""
    state, points = 0, []
    for code in codes:
        z = state & 1
        points.append(2 * code - z * ((code > 0) - (code < 0)) if states > 1 else code)
        state = following(state, abs(code) & 1, states)
    return points


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("columns", [1, 2, 6, 7, 8, 100])
def test_points_are_those_of_a_walk_through_the_states(states, columns):
    codes = torch.randint(-4, 5, (5, columns), generator=torch.Generator().manual_seed(columns))
    shape = (5, columns)
    form = Trellis(
        codes.to(torch.int8),
        torch.ones(1, 1),
        states=states,
        axis=0,
        shape=shape,
        dtype=torch.float32,
    )
    assert form.points().tolist() == [walked(row, states) for row in codes.tolist()]


def test_a_walk_by_hand():
    # Eight states: 1 leads from 0 to 2, and on to 1 (z = 1), where 1 stands for 1 and not for 2.
    codes = torch.tensor([[1, 0, 1, -2]])
    assert [following(0, 1, 8), following(2, 0, 8), following(1, 1, 8)] == [2, 1, 7]
    assert quantizers(codes, 8).tolist() == [[0, 0, 1, 1]]
    assert walked([1, 0, 1, -2], 8) == [2, 0, 1, -3]


@pytest.mark.parametrize("states", [4, 8, 16])
def test_the_path_is_the_best_of_all_paths(states):
    for seed in range(3):
        row = noise(1, 5, seed=seed) * 3
        errors = [
            sum(
                (x - p) ** 2
                for x, p in zip(row[0].tolist(), walked(list(codes), states), strict=True)
            )
            for codes in itertools.product(range(-4, 5), repeat=5)
        ]
        form = Trellis.encode(row, step=1.0, states=states)
        assert float(((form.dense() - row) ** 2).sum()) == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize(("shape", "axis"), [((6, 40), 0), ((4, 5, 3, 3), 1), ((30,), None)])
def test_error_shrinks_with_the_step_and_never_exceeds_it(states, shape, axis):
    weight = noise(*shape)
    for step in (0.5, 0.01):
        form = Trellis.encode(weight, step=step, states=states, axis=axis)
        error = (form.dense() - weight).abs().max()
        # A path never gains from a point farther than the two of its grid beside the weight.
        assert error <= step * (0.5 if states == 1 else 3) + 1e-6
        assert form.dense().shape == weight.shape


def test_states_buy_the_gain_that_is_known_of_them():
    # In units of step**2: a lone grid of twice the step has 1/3; Marcellin and Fischer's table I
    # gives 8 states 1.1 to 1.2 dB, and more states more.
    weight = noise(50, 400)
    errors = [
        float(((Trellis.encode(weight, step=0.05, states=s).dense() - weight) ** 2).mean() / 0.0025)
        for s in (4, 8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert 0.25 < errors[1] < 0.26


def test_codes_take_the_narrowest_type():
    for step, dtype in [(1.0, torch.int8), (0.01, torch.int16), (1e-5, torch.int32)]:
        assert Trellis.encode(noise(3, 40), step=step).codes.dtype == dtype
    with pytest.raises(OptionError, match="choose a larger step"):
        Trellis.encode(noise(3, 40), step=1e-12)


def test_each_row_may_have_a_step_of_its_own():
    weight = noise(3, 40)
    form = Trellis.encode(weight, step=torch.tensor([1.0, 0.1, 0.01]), states=8)
    error = (form.dense() - weight).abs().amax(1)
    assert (error <= torch.tensor([3.0, 0.3, 0.03])).all()


def test_half_and_moves_keep_codes_and_steps():
    form = Trellis.encode(noise(4, 20), step=0.1, states=8)
    codes, step = form.codes.clone(), form.step.clone()
    half = form.half()
    assert half.dense().dtype == torch.float16
    assert torch.equal(half.codes, codes)
    assert torch.equal(half.step, step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0.0}, "give a number > 0"),
        ({"step": torch.ones(3)}, "or 4 of them"),
        ({"step": 1.0, "states": 2}, r"states=2 .* choose one of \[1, 4, 8, 16, 32, 64\]"),
        ({"step": 1.0, "axis": 2}, "axis=2 is no dimension"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Trellis.encode(noise(4, 20), **options)


def test_parts_that_do_not_fit_are_refused():
    form = Trellis.encode(noise(4, 20), step=0.1, states=8)
    parts = {"codes": form.codes, "step": form.step}
    twin = Trellis.build(form.config(), parts, form.shape, form.dtype)
    assert torch.equal(twin.dense(), form.dense())
    for wrong in (
        {"codes": form.codes[:2]},
        {"codes": form.codes.float()},
        {"step": form.step.double()},
        {"step": torch.ones(3, 1)},
    ):
        with pytest.raises(ValueError, match="must be"):
            Trellis.build(form.config(), {**parts, **wrong}, form.shape, form.dtype)
