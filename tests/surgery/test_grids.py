"""Grids on layers: they round what passes, beside forms, through copies, pickles and exports."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tersor.errors import OptionError
from tersor.forms import Affine
from tersor.forms.grid import DynamicGrid, Grid
from tersor.forms.scaling import Scaling
from tersor.surgery import hold
from tersor.surgery.grids import grid_of, grids, place_of, put, put_scaling, remove


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def gridded():
    model = net()
    put(model[0], "input", Grid.spanning(-2, 2))
    put(model[1], "output", Grid.spanning(0, 2))
    put(model[2], "input", DynamicGrid())
    return model


def by_hand(model, x):
    first, _, last = net()
    x = nn.functional.linear(grid_of(model[0], "input")(x), first.weight, first.bias)
    x = DynamicGrid()(grid_of(model[1], "output")(x.relu()))
    return nn.functional.linear(x, last.weight, last.bias)


def test_inputs_and_outputs_are_rounded():
    x = torch.randn(5, 8)
    model = gridded()
    assert torch.equal(model(x), by_hand(model, x))
    assert torch.equal(model[0](input=x), model[0](x))
    assert not torch.equal(model(x), net()(x))


@pytest.mark.parametrize("first", ["hold", "grid"])
def test_a_grid_and_a_form_share_a_layer_in_either_order(first):
    x = torch.randn(5, 8)
    layer = net()[0]
    grid, form = Grid.spanning(-1, 1), Affine.encode(layer.weight, bits=4)
    steps = [lambda: hold(layer, "weight", form), lambda: put(layer, "input", grid)]
    for step in steps if first == "hold" else steps[::-1]:
        step()
    expected = nn.functional.linear(grid(x), form.dense(), layer.bias)
    for twin in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)


def test_copies_pickles_and_exports_round_alike():
    x, model = torch.randn(5, 8), gridded()
    expected = model(x)
    revived = pickle.loads(pickle.dumps(model))
    # A hook of a new process must not take the place of the grid's.
    for _ in range(3):
        revived[0].register_forward_pre_hook(lambda layer, args: None)
    for twin in (copy.deepcopy(model), revived, torch.export.export(model, (x,)).module()):
        assert torch.equal(twin(x), expected)
    fresh = gridded()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)


def test_a_shared_grid_stays_shared():
    model = net()
    shared = Grid.spanning(-1, 1)
    put(model[0], "input", shared)
    put(model[2], "input", shared)
    twin = copy.deepcopy(model)
    assert [path for path, _, _, _ in grids(twin)] == ["0", "2"]
    assert grid_of(twin[0], "input") is grid_of(twin[2], "input")
    assert len(list(twin.buffers())) == 2


def test_what_was_removed_rounds_no_more():
    x, model = torch.randn(5, 8), gridded()
    for _, where, layer, grid in list(grids(model)):
        assert remove(layer, where) is grid
    assert torch.equal(model(x), net()(x))
    assert remove(model[0], "input") is None


def test_an_input_is_scaled_before_it_is_rounded():
    x, layer, grid = torch.randn(5, 8), net()[0], Grid.spanning(-1, 1)
    factor = torch.rand(8) + 0.5
    put(layer, "input", grid)
    put_scaling(layer, Scaling(factor))
    expected = nn.functional.linear(grid(x * factor), layer.weight, layer.bias)
    for twin in (layer, pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)


def test_fused_encoder_layers_of_torch_do_not_pass_by_grids():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        plain = layer(x)
        put(layer.linear1, "input", Grid.spanning(-0.5, 0.5, bits=2))
        assert not torch.allclose(layer(x), plain, atol=1e-3)


def test_where_a_grid_cannot_sit_is_said():
    with pytest.raises(OptionError, match="where='side'"):
        put(net()[0], "side", Grid.spanning(0, 1))
    with pytest.raises(OptionError, match="put it on the layer"):
        put(Grid.spanning(0, 1), "input", Grid.spanning(0, 1))
    assert place_of("a.b.input_grid") == ("a.b", "input")
    assert place_of("a.b") is None
