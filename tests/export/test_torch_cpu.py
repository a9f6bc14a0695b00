"""Packed layers compute what the model computes, on torch's integer kernels."""

import copy

import pytest
import torch
from torch import nn

import zoo
from tersor.export import packed
from tersor.forms.grid import DynamicGrid, Grid
from tersor.forms.scaling import Scaling
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import decoded
from tersor.surgery.grids import put, put_scaling

BFLOAT = 2.0**-7


def layer(inputs=128, outputs=64, **options):
    torch.manual_seed(inputs + outputs)
    return rtn(nn.Sequential(nn.Linear(inputs, outputs)).eval(), **options)


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 64, "symmetric": False},
        {"bits": 4, "group_size": 128},
        {"bits": 4},
        {"bits": 3, "group_size": 32},
        {"bits": 1},
        {"bits": 8},
        {"bits": 6},
        {"bits": 8, "per_tensor": True},
    ],
    ids=str,
)
def test_codes_are_multiplied_by_bfloat16(rows, options):
    net = layer(**options)
    x = torch.randn(*rows, 128, generator=torch.Generator().manual_seed(0))
    done = packed(net)
    bits = "4" if options["bits"] <= 4 else "8"
    assert done.layers == {"0": f"{bits}-bit codes, bfloat16 activations"}
    with torch.inference_mode():
        assert relative(done.model(x), net(x)) < BFLOAT
        narrow = nn.functional.linear(x.bfloat16().float(), net[0].weight, net[0].bias)
        if options.get("symmetric", True):
            # Against rounded inputs only the rounding of the sum remains.
            assert torch.allclose(done.model(x), narrow, rtol=BFLOAT, atol=0.02)
    assert done.model(x).dtype == x.dtype


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"bits": 4}, {"bits": 8, "per_tensor": True}], ids=str
)
def test_inputs_on_a_grid_are_multiplied_as_integers(options, bits, signed):
    net, x = layer(**options), 2 * torch.randn(9, 128)
    put(net[0], "input", Grid.spanning(-3.0, 4.0, bits=bits, signed=signed))
    put(net[0], "output", Grid.spanning(-9.0, 9.0, bits=8))
    done = packed(net)
    assert done.layers == {"0": "8-bit integers"}
    with torch.inference_mode():
        found, wanted = done.model(x), net(x)
        # A sum between two levels of the output may go either way.
        assert (found - wanted).abs().max() < 1.01 * net[0].output_grid.scale
        assert ((found - wanted).abs() > 1e-5).float().mean() < 0.01


def test_dynamic_grids_are_multiplied_as_integers():
    net, x = layer(bits=8), torch.randn(9, 128)
    put(net[0], "input", DynamicGrid())
    done = packed(net)
    assert done.layers == {"0": "8-bit integers"}
    with torch.inference_mode():
        for batch in (x, x.abs(), -x.abs(), torch.zeros(2, 128)):
            assert torch.allclose(done.model(batch), net(batch), atol=1e-4)


@pytest.mark.parametrize("grid", [True, False])
def test_an_input_is_scaled_before_it_is_rounded(grid):
    net, x = layer(bits=8), torch.randn(9, 128)
    put_scaling(net[0], Scaling(torch.linspace(0.1, 3, 128)))
    if grid:
        put(net[0], "input", Grid.spanning(-5.0, 5.0))
    with torch.inference_mode():
        assert relative(packed(net).model(x), net(x)) < (1e-5 if grid else BFLOAT)


def test_one_row_worked_by_hand():
    # Sixteen outputs of 32 inputs, all weights 2 steps of 0.5: 32 * 1.0 * 0.25 + 1.
    net = layer(32, 16, bits=4)
    with torch.no_grad():
        net[0].weight_form.codes.fill_(2)
        net[0].weight_form.scale.fill_(0.5)
        net[0].bias.fill_(1.0)
    assert packed(net).model(torch.full((1, 32), 0.25)).flatten().tolist() == [9.0] * 16


def test_what_no_kernel_fits_stays_and_says_why():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.odd = nn.Linear(64, 32), nn.Linear(64, 30)
            self.short, self.zeros = nn.Linear(48, 32), nn.Linear(64, 32)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.fits, self.watched = nn.Linear(32, 32), nn.Linear(32, 32)
            self.watched.register_forward_hook(lambda *_: None)

    net = Several().eval()
    rtn(net, bits=4, group_size=32, include=["odd", "short", "attention.*"])
    rtn(net, bits=8, symmetric=False, include="zeros")
    rtn(net, bits=8, include=["fits", "watched"])
    done = packed(net)
    assert done.layers == {"fits": "8-bit codes, bfloat16 activations"}
    assert done.skipped == {
        "plain": "its weight is not stored as integer codes",
        "odd": "30 outputs: the kernel takes multiples of 16",
        "short": "48 inputs, group_size=32: the kernel takes whole groups of 32, 64, 128 or 256",
        "zeros": "codes of 8 bits need one scale per output, and no zero points",
        "watched": "it has hooks of its own",
        "attention.out_proj": "MultiheadAttention reads its weight itself",
    }


def test_what_does_more_than_multiply_stays():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.read, self.called = (
                Doubling(64, 64),
                nn.Linear(64, 64),
                nn.Linear(64, 64),
            )

        def forward(self, x):
            return self.called(self.own(x)) @ self.read.weight

    net, x = rtn(Reading().eval(), bits=8), torch.randn(3, 64)
    done = packed(net)
    assert list(done.layers) == ["called"]
    assert done.skipped == {
        "own": "it has a forward of its own",
        "read": "Reading reads its weight itself",
    }
    with torch.inference_mode():
        assert relative(done.model(x), net(x)) < 2 * BFLOAT


def test_an_older_torch_keeps_the_layers(monkeypatch):
    monkeypatch.setattr("tersor.export.torch_cpu._has", lambda library, kernel: False)
    done = packed(layer(bits=4))
    assert done.layers == {}
    assert "has no _weight_int4pack_mm_for_cpu" in done.skipped["0"]


def test_the_model_itself_stays_and_the_copy_copies():
    net, x = layer(bits=4, group_size=32), torch.randn(3, 128)
    before = copy.deepcopy(net.state_dict())
    copied = copy.deepcopy(packed(net).model)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(copied(x), packed(net).model(x))


def test_a_tied_head_is_packed_beside_its_table(shared_data):
    net, ids = rtn(zoo.stories260k(), bits=8), zoo.story_ids(1)[0][None, :60]
    done = packed(net)
    assert set(done.skipped.values()) == {"172 inputs: the kernel takes multiples of 32"}
    with torch.inference_mode(), decoded(net):
        wanted, found = net(ids), done.model(ids)
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9
    assert relative(found, wanted) < 0.05
