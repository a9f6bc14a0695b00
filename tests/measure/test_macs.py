import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import zoo
from tersor.errors import TaskError
from tersor.forms import Affine
from tersor.measure import macs
from tersor.measure.macs import _RULES
from tersor.program.interpreter import Interpreted
from tersor.program.trace import trace
from tersor.surgery import walk


@pytest.mark.parametrize(
    ("net", "side", "low", "high"),
    [
        # The published 568.7 M; 41 M of He et al.; and the two ways ResNet-50 is counted.
        (zoo.MobileNetV1(1.0), 224, 568_740_352, 568_740_352),
        (zoo.MobileNetV1(0.25), 128, 13.5e6, 14.5e6),
        (zoo.CifarResNet(20), 32, 40.5e6, 41.0e6),
        (zoo.ResNet50(), 224, 4.08e9, 4.12e9),
    ],
)
def test_known_networks_have_their_published_macs(net, side, low, high):
    assert low <= macs(net, torch.zeros(1, 3, side, side)).total <= high


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def zeros(*shapes):
    return tuple(torch.zeros(shape) for shape in shapes)


WORKED = {
    "linear": (nn.Linear(4, 5), zeros((2, 3, 4)), 2 * 3 * 4 * 5),
    "linear without bias": (nn.Linear(4, 5, bias=False), zeros((4,)), 20),
    # 6 -> 4 channels in 2 groups, 3 x 3 dilated to 5 x 5, so 8 x 8 gives 4 x 4.
    "dilated grouped convolution": (
        nn.Conv2d(6, 4, 3, groups=2, dilation=2),
        zeros((1, 6, 8, 8)),
        4 * 16 * 3 * 9,
    ),
    "strided 1-d convolution": (
        nn.Conv1d(2, 3, 5, stride=2),
        zeros((2, 2, 11)),
        2 * 3 * 4 * 2 * 5,
    ),
    # Each of 2 x 4 x 7 inputs is spread over 3 places of each of 6 / 2 channels.
    "transposed convolution": (
        nn.ConvTranspose1d(4, 6, 3, 2, groups=2),
        zeros((2, 4, 7)),
        2 * 4 * 7 * 3 * 3,
    ),
    # 5 steps, 2 samples, 4 gates of 3; the second layer reads both directions' 6.
    "two-layer bidirectional LSTM": (
        nn.LSTM(4, 3, 2, bidirectional=True),
        zeros((5, 2, 4)),
        5 * 2 * 2 * (12 * 4 + 12 * 3) + 5 * 2 * 2 * (12 * 6 + 12 * 3),
    ),
    "LSTM with projection": (
        nn.LSTM(4, 3, proj_size=2),
        zeros((5, 2, 4)),
        5 * 2 * (12 * 4 + 12 * 2 + 3 * 2),
    ),
    "GRU": (nn.GRU(4, 3, batch_first=True), zeros((2, 5, 4)), 5 * 2 * (9 * 4 + 9 * 3)),
    "tanh RNN": (nn.RNN(4, 3), zeros((5, 2, 4)), 5 * 2 * (3 * 4 + 3 * 3)),
    "LSTM cell": (nn.LSTMCell(4, 3), zeros((2, 4)), 2 * (12 * 4 + 12 * 3)),
    # Four 8 x 8 projections of 2 x 3 tokens; 2 heads of 3 x 3 pairs of width 4, twice.
    "attention": (
        nn.MultiheadAttention(8, 2, batch_first=True),
        zeros((2, 3, 8), (2, 3, 8), (2, 3, 8)),
        4 * 6 * 64 + 2 * 2 * 2 * 9 * 4,
    ),
    "encoder layer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        zeros((2, 3, 8)),
        4 * 6 * 64 + 2 * 2 * 2 * 9 * 4 + 2 * 6 * 8 * 16,
    ),
    "fused attention": (
        Call(functional.scaled_dot_product_attention),
        zeros((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
        2 * 4 * 3 * 5 * 16,
    ),
    "attention with a narrower value": (
        Call(functional.scaled_dot_product_attention),
        zeros((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)),
        2 * 4 * 3 * 5 * 14,
    ),
    "bilinear": (nn.Bilinear(3, 4, 5), zeros((2, 3), (2, 4)), 2 * 5 * 3 * (4 + 1)),
    "embedding": (nn.Embedding(7, 4), (torch.zeros(2, 3, dtype=torch.int64),), 0),
    "matrix times vector": (Call(torch.matmul), zeros((3, 4), (4,)), 12),
    "dot product": (Call(torch.dot), zeros((4,), (4,)), 4),
    "batched product, summed": (
        Call(torch.addbmm),
        zeros((3, 5), (2, 3, 4), (2, 4, 5)),
        2 * 3 * 4 * 5,
    ),
    "batched product": (
        Call(torch.baddbmm),
        zeros((2, 3, 5), (2, 3, 4), (2, 4, 5)),
        2 * 3 * 4 * 5,
    ),
    "einsum": (
        Call(lambda a, b: torch.einsum("bij,bjk->bik", a, b)),
        zeros((2, 3, 4), (2, 4, 5)),
        2 * 3 * 4 * 5,
    ),
    "norm, activation and pooling": (
        nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        zeros((1, 2, 4, 4)),
        0,
    ),
}


@pytest.mark.parametrize("name", WORKED)
def test_macs_worked_by_hand(name):
    net, inputs, expected = WORKED[name]
    assert macs(net, inputs).total == expected


@pytest.mark.parametrize(
    ("groups", "kernel", "stride", "padding", "dilation"),
    [(1, 3, 1, 1, 1), (2, 3, 2, 0, 1), (4, 1, 1, 0, 1), (2, 5, 3, 2, 2)],
)
def test_convolution_equals_the_naive_loop(groups, kernel, stride, padding, dilation):
    net = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups)
    reach = dilation * (kernel - 1) + 1
    naive = 0
    for _output in range(8):
        for _row in range(0, 12 + 2 * padding - reach + 1, stride):
            for _column in range(0, 9 + 2 * padding - reach + 1, stride):
                naive += kernel * kernel * (4 // groups)
    assert macs(net, torch.zeros(1, 4, 12, 9)).total == naive


def test_every_layer_gets_its_own():
    found = macs(zoo.CifarResNet(20), torch.zeros(2, 3, 32, 32))
    assert found.batch == 2
    assert found.by_layer["conv1"] == 2 * 32 * 32 * 16 * 27
    assert found.by_layer["layer3.0.conv1"] == 2 * 8 * 8 * 64 * 32 * 9
    assert found.by_layer["linear"] == 2 * 640
    assert len(found.by_layer) == 20
    assert sum(found.by_layer.values()) == found.total


def test_attention_and_tied_layers_are_told_apart():
    found = macs(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(1, 3, 8))
    assert found.by_layer["self_attn.out_proj"] == 3 * 64
    assert found.by_layer["linear1"] == 3 * 128
    ids = torch.zeros(1, 6, dtype=torch.int64)
    stories = macs(zoo.Stories(), ids).by_layer
    assert stories["output"] == 6 * 64 * 512
    assert "tok_embeddings" not in stories


def test_held_weights_count_the_same_and_decoding_counts_nothing():
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3), nn.Unflatten(1, (1, 3)), nn.LSTM(3, 2)
    )
    held = copy.deepcopy(net)
    for site in walk(held):
        site.hold(Affine.encode(site.weight, bits=4, axis=site.axis))
    x = torch.zeros(2, 2, 6)
    assert macs(held, x) == macs(net, x)


def test_inference_mode_inside_the_model_hides_nothing():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(4, 5), nn.Unflatten(1, (1, 5)), nn.GRU(5, 2, batch_first=True)
            )

        @torch.inference_mode()
        def forward(self, x):
            return self.layers(x)

    found = macs(Inside(), torch.zeros(3, 4))
    assert found.by_layer == {"layers.0": 60, "layers.2": 3 * (6 * 5 + 6 * 2)}


def test_inputs_by_name_work_and_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(4, 5), nn.Dropout()).train()
    net[0].eval()
    assert macs(net, {"input": torch.zeros(1, 4)}).total == 20
    assert [m.training for m in net.modules()] == [True, False, True]
    assert not net[0]._forward_hooks
    assert not net[0]._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failing_forward_leaves_no_hooks():
    net = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(TaskError, match="shapes cannot be multiplied"):
        macs(net, torch.zeros(1, 3))
    assert not net[0]._forward_hooks


def test_inputs_that_do_not_fit_are_the_datas_fault():
    with pytest.raises(TaskError, match=r"inputs of shape \(2, 5\), int64; torch says: mat1"):
        macs(nn.Linear(4, 3), torch.ones(2, 5, dtype=torch.int64))


def test_interpreted_network_has_the_macs_of_the_original():
    net, x = zoo.CifarResNet(8).eval(), torch.zeros(2, 3, 32, 32)
    again = Interpreted(trace(net, (x,)), net)
    assert macs(again, x) == macs(net, x)


@pytest.mark.parametrize("name", ["two-layer bidirectional LSTM", "LSTM with projection", "GRU"])
def test_what_a_gpu_does_in_one_operator_counts_as_much(name):
    net, inputs, expected = WORKED[name]
    x = inputs[0].transpose(0, 1) if net.batch_first else inputs[0]
    rule = _RULES[torch.ops.aten._cudnn_rnn]
    assert rule((), x, net._flat_weights, 4, None) == expected
