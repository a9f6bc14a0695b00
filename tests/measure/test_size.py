import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import zoo
from tersor.errors import ModelError
from tersor.forms import Affine, Bitmask, Codebook, Dense
from tersor.measure import safetensors_bytes, size
from tersor.surgery import hold, walk


def by_name(model):
    return {tensor.name: tensor for tensor in size(model).tensors}


def test_bits_worked_by_hand():
    # weight 3 x 4 at 4 bits + 3 scales at 16; bias 3 x 32.
    model = nn.Sequential(nn.Linear(4, 3))
    hold(model[0], "weight", Affine.encode(model[0].weight, bits=4))
    found = size(model)
    assert found.bits_by_form == {"affine": 12 * 4 + 3 * 16, "float32": 96}
    assert (found.total_bits, found.bytes, found.parameters) == (192, 24, 15)
    held = by_name(model)["0.weight"]
    assert (held.kind, held.form, held.shape, held.bytes) == ("Linear", "affine", (3, 4), 12)


def test_nested_forms_count_what_is_stored():
    # Half of 8 weights are zero: a mask of one byte and four codes of 8 bits, and one scale.
    weight = torch.tensor([[1.0, 0, 2, 0, 3, 0, 4, 0]])
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    form = Affine.encode(weight, bits=8)
    hold(form, "codes", Bitmask.encode(form.codes))
    hold(model[0], "weight", form)
    assert size(model).total_bits == form.stored_bits() == 8 + 4 * 8 + 16


def test_batch_norm_buffers_count_as_bits_and_not_as_parameters():
    # weight, bias, mean and variance of 5 at 32 bits, and one 64-bit counter.
    found = size(nn.BatchNorm1d(5))
    assert (found.parameters, found.total_bits) == (10, 4 * 5 * 32 + 64)


def test_tied_weights_and_shared_forms_count_once():
    model = zoo.Stories()
    assert size(model).parameters == 260_032
    site = walk(model)[0]
    site.hold(Codebook.encode(site.weight, torch.linspace(-1, 1, 16)))
    found = size(model)
    assert found.parameters == 260_032
    assert found.bits_by_form["codebook"] == 512 * 64 * 4 + 16 * 32


@pytest.mark.parametrize(
    ("net", "parameters"),
    [(zoo.MobileNetV1(), 4_231_976), (zoo.ResNet50(), 25_557_032), (zoo.CifarResNet(20), 269_722)],
)
def test_parameters_are_the_published_ones_in_any_form(net, parameters):
    assert size(net).parameters == parameters
    site = walk(net)[3]
    site.hold(Dense.encode(site.weight, dtype=torch.float16))
    assert size(net).parameters == parameters


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
        self.narrow = nn.Parameter(torch.zeros(7, dtype=torch.float16))
        self.register_buffer("flags", torch.ones(3, dtype=torch.bool))
        self.register_buffer("made_by_code", torch.ones(99), persistent=False)
        self.normed = weight_norm(nn.Linear(4, 4))
        self.empty = nn.Parameter(torch.zeros(0, 3))


@pytest.mark.parametrize(
    "model",
    [Odd(), nn.LSTM(3, 4, 2), zoo.CifarResNet(20), zoo.Stories().double()],
    ids=lambda m: type(m).__name__,
)
def test_safetensors_bytes_are_those_of_the_file(model):
    state = {
        id(tensor): (name, tensor)
        for name, tensor in reversed(list(model.state_dict(keep_vars=True).items()))
    }
    kept = (pair for pair in state.values() if not pair[0].endswith("num_batches_tracked"))
    written = save({name: tensor.detach() for name, tensor in kept})
    assert safetensors_bytes(model) == len(written)


def test_safetensors_bytes_do_not_change_when_a_weight_is_held():
    model = zoo.ResNet8()
    before = safetensors_bytes(model)
    for site in walk(model):
        site.hold(Affine.encode(site.weight, bits=4, axis=site.axis))
    assert safetensors_bytes(model) == before


def test_resnet20_is_its_published_file(shared_data):
    file = (shared_data / "weights" / "resnet20_cifar10.safetensors").stat().st_size
    assert safetensors_bytes(zoo.resnet20()) == file == 1_092_520


def test_json_is_plain_and_complete():
    plain = size(nn.Linear(2, 1)).as_json()
    assert plain["total_bits"] == 96
    weight = {"name": "weight", "kind": "Linear", "form": "float32", "shape": [1, 2]}
    assert plain["tensors"][0] == {**weight, "parameters": 2, "bits": 64}


def test_a_model_that_stores_nothing_is_refused():
    with pytest.raises(
        ModelError, match=r"ReLU has no parameters and no buffers; pass the trained"
    ):
        size(nn.ReLU())
