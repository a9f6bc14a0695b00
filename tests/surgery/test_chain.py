"""Chains: layers in a row give exactly what their one weight gives, wherever they are put."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from surgery.nets import Conv1D
from tersor.codec import load, save
from tersor.errors import ModelError
from tersor.measure import macs
from tersor.methods import run
from tersor.surgery.chain import Chain, chain_for, put_chains, replace, whole_because
from tersor.surgery.links import factors_of, fit, sizes_of, work
from tersor.task import classification

LAYERS = {
    "linear": (lambda: nn.Linear(12, 8), (5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 12)),
    "conv1d of gpt-2": (lambda: Conv1D(8, 12), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 4, stride=3, padding=2), (2, 6, 17)),
    "conv2d": (
        lambda: nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 0), dilation=(1, 2)),
        (2, 6, 9, 8),
    ),
    "conv2d, same": (lambda: nn.Conv2d(6, 8, 4, padding="same", bias=False), (2, 6, 5, 5)),
    "conv2d, reflect": (
        lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"),
        (2, 6, 7, 7),
    ),
    "conv3d": (lambda: nn.Conv3d(3, 4, (2, 3, 2), padding=1), (1, 3, 4, 5, 6)),
}
RANKS = {"low_rank": (3,), "tucker": (3, 2), "cp": (5,)}
TRAIN = (4, 3, 2, 4, 7)  # 12 = 4 * 3 inputs, 8 = 2 * 4 outputs, rank 7 between two cores


def made(name: str, made_by: str) -> tuple[nn.Module, Chain, Tensor] | None:
    """A layer, a chain of random weights with the layer's bias, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    if whole_because(layer, made_by):
        return None
    chain = chain_for(layer, made_by, TRAIN if made_by == "tensor_train" else RANKS[made_by])
    for parameter_name, parameter in chain.named_parameters():
        if parameter_name.endswith("weight"):
            nn.init.normal_(parameter)
    return layer, chain, torch.randn(shape)


@pytest.mark.parametrize("made_by", [*RANKS, "tensor_train"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_chain_gives_what_its_weight_gives(name, made_by):
    found = made(name, made_by)
    if found is None:
        assert made_by == "tensor_train" or name.startswith(("linear", "conv1d of"))
        return
    layer, chain, x = found
    with torch.no_grad():
        assert chain.weight.shape == layer.weight.shape
        layer.weight.copy_(chain.weight)
        assert torch.allclose(chain(x), layer(x), rtol=1e-4, atol=1e-4)
    assert chain.bias is layer.bias


@pytest.mark.parametrize("made_by", [*RANKS, "tensor_train"])
@pytest.mark.parametrize("name", LAYERS)
def test_sizes_and_work_are_what_is_measured(name, made_by):
    found = made(name, made_by)
    if found is None:
        return
    layer, chain, x = found
    links = work(layer, made_by, chain.ranks, x.shape, layer(x).shape)
    weights = [p for n, p in chain.named_parameters() if n.endswith("weight")]
    assert [numbers for numbers, _ in links] == [weight.numel() for weight in weights]
    assert sum(numbers * uses for numbers, uses in links) == macs(chain, x).total


def test_a_chain_tells_what_the_layer_told():
    layer, chain, _ = made("conv2d", "tucker")
    for attribute in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
    ):
        assert getattr(chain, attribute) == getattr(layer, attribute)
    layer, chain, _ = made("linear", "tensor_train")
    assert (chain.in_features, chain.out_features) == (layer.in_features, layer.out_features)
    assert not hasattr(chain, "in_channels")
    assert [type(link) for link in chain[:1]] == [type(chain[0])]


def test_a_tensor_train_worked_by_hand():
    # Inputs (a, b) of 2 x 2, outputs (c, d) of 2 x 2, rank 1: the first core is the identity, the
    # second swaps: y[c, d] = x[c, 1 - d].
    layer = nn.Linear(4, 4, bias=False)
    chain = chain_for(layer, "tensor_train", (2, 2, 2, 2, 1))
    with torch.no_grad():
        chain[0].linear.weight.copy_(torch.eye(2))
        chain[1].linear.weight.copy_(torch.eye(2).flip(0))
        assert chain(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[2.0, 1.0, 4.0, 3.0]]


@pytest.mark.parametrize(
    "modes", [((2, 3), (3, 2)), ((2, 2, 3), (3, 1, 2)), ((3, 2, 1), (1, 2, 3))]
)
def test_a_tensor_train_equals_the_sum_over_all_ranks(modes):
    """Novikov et al. 2015, eq. 5, written out."""
    first, second = modes
    count, between = len(first), [2] * (len(first) - 1)
    layer = nn.Linear(math.prod(first), math.prod(second), bias=False)
    chain = chain_for(layer, "tensor_train", (*first, *second, *between))
    edges, cores = [1, *between, 1], []
    for at in range(count):
        weight = chain[at].linear.weight
        nn.init.normal_(weight)
        # (next rank, outputs, rank, inputs)
        cores.append(weight.reshape(edges[at + 1], second[at], edges[at], first[at]))
    for row in range(math.prod(second)):
        for column in range(math.prod(first)):
            i, j = (
                torch.unravel_index(torch.tensor(row), second),
                torch.unravel_index(torch.tensor(column), first),
            )
            value = torch.eye(1)
            for at, core in enumerate(cores):
                value = core[:, i[at], :, j[at]] @ value
            assert torch.allclose(chain.weight[row, column], value.squeeze(), atol=1e-5)


def test_factors_are_near_each_other():
    assert [factors_of(n, 2) for n in (64, 12, 7, 1)] == [(8, 8), (4, 3), (7, 1), (1, 1)]
    assert factors_of(784, 3) == (14, 8, 7)
    assert all(math.prod(factors_of(n, 3)) == n for n in range(1, 200))


def test_a_chain_is_put_under_each_path_of_its_layer():
    layer = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": layer, "b": nn.Sequential(nn.ReLU(), layer)})
    put_chains(net, {"b.1": ("low_rank", (2,))})
    assert net["a"] is net["b"][1]
    assert isinstance(net["a"], Chain)
    assert net["a"].bias is layer.bias


def test_a_chain_is_copied_and_pickled_whole():
    _, chain, x = made("conv2d", "cp")
    file = io.BytesIO()
    torch.save(chain, file)
    file.seek(0)
    for twin in (copy.deepcopy(chain), torch.load(file, weights_only=False)):
        assert (twin.made_by, twin.ranks) == ("cp", (5,))
        assert torch.equal(twin(x), chain(x))


def test_it_has_the_type_place_and_gradients_of_the_layer():
    layer = nn.Linear(4, 4, dtype=torch.float64, device="meta").requires_grad_(False).eval()
    chain = chain_for(layer, "low_rank", (2,))
    assert {(p.dtype, p.device.type, p.requires_grad) for p in chain.parameters()} == {
        (torch.float64, "meta", False)
    }
    assert not chain.training


def test_a_transformer_layer_calls_its_links():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    chain = chain_for(layer.linear1, "low_rank", (8,))
    with torch.no_grad():
        u, s, v = torch.linalg.svd(layer.linear1.weight, full_matrices=False)
        chain[0].weight.copy_(s[:, None] * v)
        chain[1].weight.copy_(u)
        expected, called = layer(x), []
        replace(layer, layer.linear1, chain)
        chain.register_forward_hook(lambda *_: called.append(True))
        assert torch.allclose(layer(x), expected, atol=1e-5)
    assert called


@pytest.mark.parametrize(
    ("layer", "made_by", "why"),
    [
        (nn.ReLU(), "low_rank", "ReLU is no layer"),
        (nn.LSTM(4, 4), "low_rank", "LSTM is no layer"),
        (nn.ConvTranspose2d(4, 4, 3), "low_rank", "ConvTranspose2d is no layer"),
        (nn.Conv2d(4, 4, 3, groups=2), "tucker", "in 2 groups"),
        (nn.Conv2d(4, 4, 1), "cp", "cp is for kernels over several places, not for Conv2d of"),
        (nn.Linear(4, 4), "tucker", "tucker is for kernels"),
        (nn.Conv1d(4, 4, 3), "tensor_train", "tensor_train is for linear layers"),
        (
            type("Mine", (nn.Linear,), {"forward": lambda s, x: x, "kind": "Linear"})(4, 4),
            "cp",
            "own",
        ),
        (nn.Linear(4, 4), "magic", "there is no such chain"),
    ],
)
def test_layers_that_no_chain_can_stand_for_are_refused(layer, made_by, why):
    with pytest.raises(ModelError, match=why):
        chain_for(layer, made_by, (2,))


@pytest.mark.parametrize(
    ("sizes", "made_by", "ranks"),
    [
        ((4, 6), "low_rank", (5,)),
        ((4, 6), "low_rank", (0,)),
        ((4, 6), "low_rank", (2, 2)),
        ((4, 6), "low_rank", ()),
        ((4, 6), "low_rank", (10**12,)),
        ((4, 6), "low_rank", (True,)),
        ((4, 6, 3, 3), "tucker", (7, 4)),
        ((4, 6, 3, 3), "tucker", (6, 5)),
        ((4, 6, 3, 3), "cp", (4 * 3 * 3 + 1,)),
        ((4, 6), "tensor_train", (3, 2, 2, 2, 5)),
        ((4, 6), "tensor_train", (3, 2, 2, 1, 2)),
        ((4, 6), "tensor_train", (3, 3, 2, 2, 2)),
        ((4, 6), "tensor_train", (6, 4)),
        ((4, 6), "tensor_train", (6,)),
    ],
)
def test_ranks_beyond_those_of_the_weight_are_refused(sizes, made_by, ranks):
    assert not fit(sizes, made_by, ranks)
    layer = nn.Linear(6, 4) if len(sizes) == 2 else nn.Conv2d(6, 4, 3)
    assert sizes_of(layer) == sizes
    with pytest.raises(ModelError, match=r"ranks .* are none of a weight of shape \(4, 6"):
        chain_for(layer, made_by, ranks)


def test_the_largest_ranks_fit():
    assert fit((4, 6), "low_rank", (4,))
    assert fit((4, 6, 3, 3), "low_rank", (4,))
    assert fit((4, 6, 3, 3), "tucker", (6, 4))
    assert fit((4, 6, 3, 3), "cp", (36,))
    assert fit((4, 6), "tensor_train", (3, 2, 2, 2, 4))


def test_chains_that_do_not_fit_change_nothing():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = list(net)
    for path in ("", "2", "0.weight", "1.0"):
        with pytest.raises(ModelError, match=f'there is no layer "{path}"'):
            put_chains(net, {"0": ("low_rank", (2,)), path: ("low_rank", (2,))})
    with pytest.raises(ModelError, match=r'"1": no chain .low_rank. for a Linear: ranks \(9,\)'):
        put_chains(net, {"0": ("low_rank", (2,)), "1": ("low_rank", (9,))})
    assert list(net) == before


def test_a_file_is_read_into_the_network_that_it_was_made_of(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    done = run(
        model,
        [{"method": "factorize.svd", "options": {"keep": 0.5}}],
        classification(calibration=x),
    )
    path = save(done, tmp_path / "m.tersor", example=x[:2])
    assert torch.equal(load(path, into=done)(x), done(x))
