"""Block floats bit for bit: codes, scales, ties and blocks; and their error on normal weights."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from tersor.errors import OptionError
from tersor.forms import BlockFloat
from tersor.forms.block_float import factors

# OCP MX v1.0, table 5: the sign in the highest bit, two bits of exponent, one of mantissa.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
# Each middle of two neighbours, and the one of them whose mantissa is even.
TIES = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4}


def e4m3(byte):
    """OFP8 E4M3: exponent bias 7, no infinities, NaN where all but the sign are ones."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7)
    return -size if sign else size


def e8m0(byte):
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_of(values, format="nvfp4", **options):
    """One row of one block, whose scale is 1: the largest weight is 6 and so is the format's."""
    weight = torch.tensor([[6.0, *values]])
    form = BlockFloat.encode(weight, format=format, **options)
    if format == "nvfp4":
        assert form.scale.float().item() * form.tensor_scale.item() == pytest.approx(1, rel=1e-6)
        form.scale, form.tensor_scale = form.scale.float().fill_(1), torch.ones(1)
    return form.dense()[0, 1:].tolist()


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_all_sixteen_codes_mean_what_the_standard_says(format):
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert theirs.tolist() == E2M1
    for value in E2M1:
        assert block_of([value], format) == [value]


def test_all_scales_of_nvfp4_mean_what_the_standard_says():
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ours = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    table = torch.tensor([e4m3(byte) for byte in range(256)])
    for found in (torch.from_numpy(theirs), factors(ours, torch.ones(1))):
        assert torch.equal(found.nan_to_num(999), table.nan_to_num(999))
        assert torch.equal(found.signbit() & ~found.isnan(), table.signbit() & ~table.isnan())


def test_all_scales_of_mxfp4_mean_what_the_standard_says():
    theirs = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    table = torch.tensor([e8m0(byte) for byte in range(255)])
    assert torch.equal(factors(torch.arange(255, dtype=torch.uint8), None), table)
    assert torch.equal(torch.from_numpy(theirs), table)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_ties_go_to_the_even_mantissa_and_the_rest_to_the_nearest(format):
    for middle, even in TIES.items():
        assert block_of([middle, -middle], format) == [even, -even]
        lower = max(value for value in E2M1 if value < middle)
        upper = min(value for value in E2M1 if value > middle)
        near = np.float32(middle)
        below, above = (np.nextafter(near, np.float32(to)) for to in (0, 9))
        assert block_of([below, above, -below, -above], format) == [lower, upper, -lower, -upper]


@pytest.mark.parametrize(("format", "scale"), [("nvfp4", 0.375), ("mxfp4", 1), ("mxfp4", 2**-9)])
def test_rounding_is_that_of_another_library(format, scale):
    # Eighths hit every tie, where the scale is exact.
    levels = torch.cat((normal(4500), 4 * normal(4500, 1), torch.arange(-48, 42) / 8))
    levels = levels if format == "mxfp4" else levels[:9000]
    levels = torch.nn.functional.pad(levels.clamp(-6, 6).reshape(-1, 15), (1, 0), value=6.0)
    expected = levels.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    found = BlockFloat.encode(levels * scale, format=format).dense() / scale
    assert torch.allclose(found, torch.from_numpy(expected), rtol=1e-6, atol=0)


def test_scales_worked_by_hand():
    # nvfp4: 672 / (6 * 448) = 0.25 for all. The first block needs 672 / 6 / 0.25 = 448, the second
    # 30 / 6 / 0.25 = 20; 21 lies halfway between 20 and 22 and would go to 20, whose last bit is 0.
    weight = torch.zeros(1, 32)
    weight[0, 3], weight[0, 20] = 672, -30
    form = BlockFloat.encode(weight)
    assert form.tensor_scale.tolist() == [0.25]
    assert form.scale.tolist() == [[448, 20]]
    weight[0, 20] = 31.5
    assert BlockFloat.encode(weight).scale.tolist() == [[448, 20]]
    # mxfp4: 7.9 lies in [4, 8), so the exponent is 2 - 2 = 0 and the largest weight becomes 6.
    form = BlockFloat.encode(torch.tensor([[7.9, 1.2]]), format="mxfp4")
    assert form.scale.tolist() == [[127]]
    assert form.dense().tolist() == [[6, 1]]


def test_four_or_six_worked_by_hand():
    # 8 and 6.2 of 8: to 6, steps are 8/6 and 6.2 is 4.65, which becomes 4 or 5.33; to 4, steps are
    # 2 and it becomes 6. Of the tensor's 16 the scale is 16 / 2688, and 8 needs 224 of it or 336,
    # which is between 320 and 352 and goes to 320, the even one.
    weight = torch.zeros(2, 16)
    weight[0, 0], weight[1, :2] = 16, torch.tensor([8, 6.2])
    six, four = (BlockFloat.encode(weight, four_over_six=choice) for choice in (False, True))
    assert six.scale.tolist() == [[448], [224]]
    assert four.scale.tolist() == [[448], [320]]
    assert six.dense()[1, 1].item() == pytest.approx(8 * 4 / 6)
    assert four.dense()[1, 1].item() == pytest.approx(3 * 320 * 16 / 2688)


@pytest.mark.parametrize("shape", [(4, 64), (3, 37), (5, 3, 3, 3), (64,)])
@pytest.mark.parametrize("seed", range(3))
def test_four_over_six_takes_the_better_of_two_in_every_block(shape, seed):
    weight = normal(shape, seed)
    six, best = (BlockFloat.encode(weight, four_over_six=choice) for choice in (False, True))

    def errors(form):
        apart = (form.dense() - weight).double().square().reshape(weight.shape[0], -1)
        short = -apart.shape[1] % 16
        return torch.nn.functional.pad(apart, (0, short)).reshape(-1, 16).sum(1)

    assert (errors(best) <= errors(six) * (1 + 1e-6)).all()
    assert errors(best).sum() < errors(six).sum()


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"format": "nvfp4"}, 0.0091),
        ({"format": "nvfp4", "four_over_six": True}, 0.0076),
        ({"format": "mxfp4"}, 0.0133),
    ],
    ids=str,
)
def test_error_on_normal_weights(options, bound):
    weight = normal((1024, 2048))
    error = (BlockFloat.encode(weight, **options).dense() - weight).double().square().mean()
    assert 0.97 * bound < error / weight.double().square().mean() <= bound


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 40), 0), ((40, 6), 1), ((5, 4, 3, 3), 0), ((4, 5, 3), 1), ((7,), 0)]
)
def test_a_block_belongs_to_one_output_channel(shape, axis, format):
    weight = normal(shape)
    form = BlockFloat.encode(weight, format=format, axis=axis)
    size = {"nvfp4": 16, "mxfp4": 32}[format]
    rows = weight.movedim(axis, 0).reshape(shape[axis], -1)
    blocks = -(-rows.shape[1] // size)
    assert form.scale.shape == (shape[axis], blocks)
    assert form.dense().shape == shape
    whole = 32 if format == "nvfp4" else 0
    assert form.stored_bits() == 4 * weight.numel() + 8 * shape[axis] * blocks + whole
    # Rows that are on their own, beside one that sets the scale of the tensor, are rounded alike.
    again = form.dense().movedim(axis, 0).reshape(rows.shape)
    top = rows[rows.abs().amax(1).argmax()]
    for row, found in zip(rows, again, strict=True):
        alone = BlockFloat.encode(torch.stack((row, top)), format=format).dense()
        assert torch.equal(found, alone[0])


@pytest.mark.parametrize("factor", [0.0, 2.0**-149, 1e-40, 1e-30, 1e30, 3.4e38])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_weights_of_any_size_stay_finite(factor, format):
    weight = (torch.linspace(-1, 1, 64)[None] * factor).float()
    for options in ({}, {"four_over_six": True}) if format == "nvfp4" else ({},):
        form = BlockFloat.encode(weight, format=format, **options)
        assert torch.isfinite(form.dense()).all()
        if 1e-30 <= factor <= 1e30:
            assert (form.dense() - weight).abs().max() <= factor / 4
        BlockFloat.build(form.config(), dict(form.named_buffers()), form.shape, form.dtype)


def test_a_small_block_beside_a_large_weight_keeps_something():
    # 1e6 / 2688 = 372 for all; the block of ones would need a scale of 1 / 6 / 372 < 2**-9 / 2.
    weight = torch.ones(2, 16)
    weight[0] *= 1e6
    assert BlockFloat.encode(weight).scale.tolist() == [[448], [2**-9]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_come_back_as_they_were(dtype):
    weight = normal((4, 32)).to(dtype)
    form = BlockFloat.encode(weight)
    assert form.dense().dtype == dtype
    assert torch.equal(form.dense(), BlockFloat.encode(weight.float()).dense().to(dtype))


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(OptionError, match=r"format='fp5' for a weight of shape \(2, 2\); choose"):
        BlockFloat.encode(torch.ones(2, 2), format="fp5")
    with pytest.raises(OptionError, match=r"axis=2 is no dimension of .* choose 0 to 1"):
        BlockFloat.encode(torch.ones(2, 2), axis=2)
    with pytest.raises(OptionError, match="four_over_six=True for mxfp4"):
        BlockFloat.encode(torch.ones(2, 2), format="mxfp4", four_over_six=True)


def parts(format, **changed):
    form = BlockFloat.encode(normal((2, 40)), format=format)
    return {**dict(form.named_buffers()), **changed}


@pytest.mark.parametrize(
    ("format", "changed", "rule"),
    [
        ("nvfp4", {"codes": torch.zeros(2, 39, dtype=torch.int8)}, r"int8 of shape \(2, 40\)"),
        ("nvfp4", {"codes": torch.zeros(2, 40, dtype=torch.uint8)}, "codes must be int8"),
        ("nvfp4", {"codes": torch.full((2, 40), -8, dtype=torch.int8)}, "at most 7 in size"),
        ("nvfp4", {"codes": torch.full((2, 40), -128, dtype=torch.int8)}, "at most 7 in size"),
        ("nvfp4", {"scale": torch.ones(2, 3)}, "float8_e4m3fn of shape"),
        ("nvfp4", {"scale": torch.ones(2, 2).to(torch.float8_e4m3fn)}, r"of shape \(2, 3\)"),
        ("nvfp4", {"scale": torch.full((2, 3), math.nan).to(torch.float8_e4m3fn)}, "finite"),
        ("nvfp4", {"scale": torch.full((2, 3), -1.0).to(torch.float8_e4m3fn)}, "not negative"),
        ("nvfp4", {"tensor_scale": None}, "tensor_scale must be float32"),
        ("nvfp4", {"tensor_scale": torch.ones(2)}, r"of shape \(1,\)"),
        ("nvfp4", {"tensor_scale": torch.ones(1).double()}, "must be float32"),
        ("nvfp4", {"tensor_scale": torch.tensor([math.inf])}, "tensor_scale must be finite"),
        ("mxfp4", {"tensor_scale": torch.ones(1)}, "mxfp4 has no tensor_scale"),
        (
            "mxfp4",
            {"scale": torch.full((2, 2), 255, dtype=torch.uint8)},
            "255 stands for no number",
        ),
        ("mxfp4", {"scale": torch.zeros(2, 3, dtype=torch.uint8)}, r"uint8 of shape \(2, 2\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(format, changed, rule):
    config = {"format": format, "axis": 0}
    BlockFloat.build(config, parts(format), (2, 40), torch.float32)
    with pytest.raises(ValueError, match=rule):
        BlockFloat.build(config, parts(format, **changed), (2, 40), torch.float32)


@pytest.mark.parametrize(
    "config", [{"format": "fp8", "axis": 0}, {"format": "nvfp4", "axis": None}, {"format": "nvfp4"}]
)
def test_options_of_a_file_that_do_not_fit_are_refused(config):
    with pytest.raises((ValueError, KeyError)):
        BlockFloat.build(config, parts("nvfp4"), (2, 40), torch.float32)
