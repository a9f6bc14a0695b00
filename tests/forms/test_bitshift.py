"""Bit-shift trellis: a weight is what the bits of its ring say, packed without a gap."""

import pytest
import torch

from tersor.forms import Bitshift
from tersor.forms.affine import matrix_shape
from tersor.forms.bitshift import from_tiles, pack, states, tiles, to_tiles, unpack, values

LAYOUTS = [
    # shape, axis, tile
    ((64, 10), 0, (64, 2)),
    ((7, 3), 0, (16, 1)),
    ((10, 7), 1, (4, 5)),
    ((5, 4, 3, 3), 0, (5, 16)),
    ((3, 30), None, (1, 45)),
]


def form(shape, axis, tile, *, bits=2, state_bits=10, rows=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(bits)
    outputs, inputs = matrix_shape(shape, axis)
    down, across = tiles(outputs, inputs, tile)
    codes = torch.randint(2**bits, (down * across, tile[0] * tile[1]), generator=generator)
    scale = torch.rand(outputs if rows else 1, 1, generator=generator).to(torch.bfloat16)
    layout = {"bits": bits, "state_bits": state_bits, "tile": tile, "axis": axis}
    return codes, Bitshift(pack(codes, bits), scale, shape=shape, dtype=dtype, **layout)


def value(state):
    """1MAD of the paper, in whole numbers of Python."""
    mixed = (34038481 * state + 76625530) % 2**32
    return (sum(mixed.to_bytes(4, "little")) - 510) / 147.800537


def naive(codes, made):
    """Weight by weight: the bits of a ring written out, and read `state_bits` at a time."""
    outputs, inputs = matrix_shape(made.shape, made.axis)
    rows, columns = made.tile
    matrix = torch.empty(outputs, inputs)
    for o in range(outputs):
        for i in range(inputs):
            tile = (i // columns) * -(-outputs // rows) + o // rows
            place = (i % columns) * rows + o % rows
            ring = "".join(f"{code:0{made.bits}b}" for code in codes[tile].tolist())
            end = (place + 1) * made.bits
            state = int((ring + ring[:end])[-made.state_bits :], 2)
            scale = made.scale[o if len(made.scale) > 1 else 0].item()
            matrix[o, i] = value(state) * scale
    if made.axis is None:
        return matrix.reshape(made.shape)
    moved = (made.shape[made.axis], *(n for d, n in enumerate(made.shape) if d != made.axis))
    return matrix.reshape(moved).movedim(0, made.axis)


@pytest.mark.parametrize(("shape", "axis", "tile"), LAYOUTS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weights_are_what_the_bits_of_their_rings_say(shape, axis, tile, bits):
    for state_bits, rows in ((8, True), (13, False), (16, True)):
        codes, made = form(shape, axis, tile, bits=bits, state_bits=state_bits, rows=rows)
        assert made.dense().shape == shape
        assert torch.allclose(made.dense(), naive(codes, made), rtol=1e-6, atol=0)


def test_values_worked_by_hand():
    # State 0: 76625530 = 0x0491367a, bytes 0x7a + 0x36 + 0x91 + 0x04 = 325; (325 - 510) / 147.8.
    assert values(torch.tensor([0])).item() == pytest.approx(-185 / 147.800537)
    # Ring of two-bit codes 3, 0, 0, 1: read back from the second, 8 bits are 00|01|11|00.
    assert states(torch.tensor([[3, 0, 0, 1]]), 2, 8)[0, 1].item() == 0b00011100


@pytest.mark.parametrize("state_bits", range(8, 17))
def test_values_are_spread_like_a_normal_distribution(state_bits):
    found = values(torch.arange(2**state_bits))
    assert abs(found.mean()) < 0.04
    assert found.std() == pytest.approx(1, abs=0.04)
    # About 68.3 % within one, 95.4 % within two.
    assert (found.abs() < 1).float().mean() == pytest.approx(0.683, abs=0.03)
    assert (found.abs() < 2).float().mean() == pytest.approx(0.954, abs=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 8, 13, 64])
def test_packed_codes_come_back(bits, count):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(count))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack(packed, bits, count), codes.int())


@pytest.mark.parametrize("tile", [(1, 1), (4, 3), (10, 7), (16, 16)])
def test_tiles_give_the_matrix_back_and_run_down_columns(tile):
    matrix = torch.arange(70.0).view(10, 7)
    cut = to_tiles(matrix, tile)
    assert torch.equal(from_tiles(cut, 10, 7, tile), matrix)
    assert cut[0, : min(tile[0], 10)].tolist() == matrix[: tile[0], 0].tolist()


@pytest.mark.parametrize("bits", [2, 3])
def test_it_stores_exactly_its_bits_and_one_scale(bits):
    _, made = form((256, 24), 0, (256, 1), bits=bits, rows=False)
    assert made.stored_bits() == 256 * 24 * bits + 16


def test_it_rebuilds_from_its_parts_in_half_precision_too():
    _, made = form((20, 6), 0, (10, 2), dtype=torch.bfloat16)
    parts = {name: getattr(made, name).detach() for name, _ in made.parts()}
    again = Bitshift.build(made.config(), parts, made.shape, made.dtype)
    assert again.dense().dtype == torch.bfloat16
    assert torch.equal(again.dense(), made.dense())
    assert torch.equal(made.half().dense(), made.float().dense().half())


@pytest.mark.parametrize(
    ("shape", "axis"), [((0, 5), 0), ((5, 0), 0), ((3, 0, 2), 1), ((0,), None)]
)
def test_a_weight_without_values_has_no_rings(shape, axis):
    codes, made = form(shape, axis, (8, 2))
    assert codes.numel() == 0
    assert made.dense().shape == shape


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bits": 5}, "bits=5 for a weight of shape"),
        ({"bits": True}, "bits=True"),
        ({"state_bits": 17}, "choose 8 to 16"),
        ({"tile": [2, 1]}, r"tile=\[2, 1\] for a weight of 20 outputs and 6 inputs"),
        ({"tile": [10**9, 1]}, "choose at most"),
        ({"tile": [10, 2.0]}, "tile="),
        ({"tile": 3}, "tile=3"),
        ({"axis": 2}, "axis=2 is no dimension"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(wrong, said):
    _, made = form((20, 6), 0, (10, 2))
    parts = {"codes": made.codes, "scale": made.scale.detach()}
    with pytest.raises(ValueError, match=said):
        Bitshift.build({**made.config(), **wrong}, parts, made.shape, made.dtype)


def test_parts_that_do_not_fit_are_refused():
    _, made = form((20, 6), 0, (10, 2))
    codes, scale = made.codes, made.scale.detach()
    for parts, said in (
        ({"codes": codes.int(), "scale": scale}, "codes must be uint8"),
        # 20 x 6 weights at 2 bits.
        ({"codes": codes[:-1], "scale": scale}, r"codes must be uint8 of shape \(30,\)"),
        ({"codes": codes, "scale": scale.float()}, "scale must be bfloat16"),
        ({"codes": codes, "scale": scale[:3]}, "scale must be bfloat16"),
    ):
        with pytest.raises(ValueError, match=said):
            Bitshift.build(made.config(), parts, made.shape, made.dtype)
