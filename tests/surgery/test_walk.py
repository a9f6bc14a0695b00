"""The walk finds each weight once, under the names that people use for it."""

import pytest
import torch
from torch import nn

from surgery.nets import Conv1D, make
from tersor.errors import ModelError, OptionError
from tersor.forms import Affine, Dense
from tersor.surgery import check_finite, in_execution_order, plain_copy, walk
from tersor.surgery.walk import vectors


def names(sites):
    return [site.name for site in sites]


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        ("linear", [("0.weight", "Linear", 0), ("2.weight", "Linear", 0)]),
        ("conv1d of gpt-2", [("0.weight", "Conv1D", 1), ("2.weight", "Conv1D", 1)]),
        (
            "conv",
            [
                ("0.weight", "Conv2d", 0),
                ("2.weight", "ConvTranspose2d", 1),
                ("3.weight", "Conv2d", 0),
            ],
        ),
        (
            "attention",
            [
                ("attention.in_proj_weight", "MultiheadAttention", 0),
                ("attention.out_proj.weight", "Linear", 0),
            ],
        ),
        ("tied", [("embedding.weight", "Embedding", 0), ("inner.weight", "Linear", 0)]),
        ("parametrized", [("0.weight", "Linear", 0), ("2.weight", "Linear", 0)]),
        ("weight norm", [("0.weight", "Linear", 0), ("2.weight", "Linear", 0)]),
        ("old weight norm", [("0.weight", "Linear", 0), ("2.weight", "Linear", 0)]),
    ],
)
@pytest.mark.parametrize("after_holding", [False, True])
def test_names_types_and_output_axes(net, expected, after_holding):
    model, _ = make(net)
    if after_holding:
        for site in walk(model):
            site.hold(Affine.encode(site.weight, bits=8, axis=site.axis))
    assert [(site.name, site.kind, site.axis) for site in walk(model)] == expected


def test_a_two_layer_bidirectional_lstm_has_eight_weights():
    model, _ = make("lstm")
    found = names(walk(model))
    assert len(found) == 9
    assert found[:2] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert found[-1] == "head.weight"


def test_a_tied_weight_is_one_site_with_all_its_uses():
    model, _ = make("tied")
    site = walk(model)[0]
    assert [(type(layer).__name__, name) for layer, name in site.uses] == [
        ("Embedding", "weight"),
        ("Linear", "weight"),
    ]


def test_a_layer_that_appears_twice_is_walked_once():
    layer = nn.Linear(4, 4)
    sites = walk(nn.Sequential(layer, nn.ReLU(), layer))
    assert names(sites) == ["0.weight"]
    assert len(sites[0].uses) == 1


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("Linear", None, ["body.fc.weight", "head.weight"]),
        ("body.*", None, ["body.conv.weight", "body.fc.weight"]),
        ("body.fc", None, ["body.fc.weight"]),
        ("*.weight", "head", ["body.conv.weight", "body.fc.weight"]),
        (["Conv?d", "head.weight"], None, ["body.conv.weight", "head.weight"]),
        (None, ["Conv*", "body.fc.weight"], ["head.weight"]),
        ("*.[cf]c*", None, ["body.fc.weight"]),
    ],
)
def test_patterns_choose_by_name_path_and_type(include, exclude, expected):
    model = nn.ModuleDict(
        {
            "body": nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3), "fc": nn.Linear(3, 3)}),
            "head": nn.Linear(3, 3),
        }
    )
    assert names(walk(model, include, exclude)) == expected


@pytest.mark.parametrize("pattern", ["output", "output.weight", "Embedding", "embedding.weight"])
def test_a_tied_weight_matches_by_any_of_its_names(pattern):
    model, _ = make("tied")
    assert names(walk(model, include=pattern)) == ["embedding.weight"]
    assert names(walk(model, exclude=pattern)) == ["inner.weight"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option):
    model, _ = make("linear")
    with pytest.raises(OptionError, match=f"{option}='Conv2d' matches no weight.*0.weight.*Linear"):
        walk(model, **{option: ["Linear", "Conv2d"]})


def test_patterns_that_leave_nothing_are_refused():
    model, _ = make("linear")
    with pytest.raises(OptionError, match="leave none of the 2 weights"):
        walk(model, include="0", exclude="Linear")


def test_a_network_without_weights_is_refused():
    with pytest.raises(ModelError, match="LayerNorm has no weights"):
        walk(nn.LayerNorm(4))


def test_integer_parameters_and_vectors_are_no_weights():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model.table = nn.Parameter(torch.ones(3, 3, dtype=torch.int32), requires_grad=False)
    assert names(walk(model)) == ["1.weight"]


def test_execution_order_is_that_of_the_forward_pass():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.last(self.first(x))

    model = Backwards()
    ordered = in_execution_order(model, walk(model), lambda: model(torch.ones(1, 4)))
    assert names(ordered) == ["first.weight", "last.weight", "unused.weight"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_attention_uses_its_output_layer_right_after_its_input_layer():
    model = nn.ModuleDict({"unused": nn.Linear(2, 2), "first": make("attention")[0]})
    ordered = in_execution_order(model, walk(model), lambda: model["first"](make("attention")[1]))
    assert [site.name.removeprefix("first.attention.") for site in ordered] == [
        "in_proj_weight",
        "out_proj.weight",
        "unused.weight",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    model, _ = make("linear")
    model[2].weight.data[0, :2] = value
    with pytest.raises(
        ModelError, match=r'"2.weight" of shape \(4, 6\) holds NaN or infinity in 2 of'
    ):
        check_finite(model)


def test_a_mask_of_infinities_and_float8_weights_pass():
    model = nn.Linear(4, 4)
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    walk(model)[0].hold(Dense.encode(model.weight, dtype=torch.float8_e4m3fn))
    check_finite(model)
    model.weight_form.stored.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="in 1 of its 16 values"):
        check_finite(model)


def test_a_layer_named_like_a_form_is_walked():
    model = nn.ModuleDict({"wave_form": nn.Sequential(nn.Linear(2, 2)), "last": nn.Linear(2, 2)})
    assert names(walk(model)) == ["wave_form.0.weight", "last.weight"]


def test_empty_weights_are_left_out():
    model = nn.Sequential(nn.Linear(4, 2))
    model[0].unused = nn.Parameter(torch.empty(0, 4))
    assert names(walk(model)) == ["0.weight"]


def test_buffers_are_checked_too_and_clean_networks_pass():
    model = nn.BatchNorm1d(3)
    check_finite(model)
    model.running_var[0] = float("nan")
    with pytest.raises(ModelError, match="running_var"):
        check_finite(model)


def test_the_weight_of_a_site_is_what_the_layer_computes_with():
    layer = Conv1D(3, 5)
    site = walk(layer)[0]
    assert (site.name, site.axis) == ("weight", 1)
    assert torch.equal(site.weight, layer.weight)
    site.hold(Affine.encode(site.weight, bits=4, axis=1))
    assert site.form.scale.shape == (3, 1)
    assert torch.equal(site.weight, layer.weight)


@pytest.mark.parametrize("net", [nn.LazyLinear(3), nn.Linear(3, 3, device="meta")])
def test_weights_without_values_are_named(net):
    with pytest.raises(ModelError, match=r'"0.weight" has no values yet; run the network once'):
        check_finite(nn.Sequential(net))


def test_a_copy_is_plain_and_of_what_was_compiled():
    made = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    plain = plain_copy(torch.compile(nn.Sequential(made)))
    assert list(plain.state_dict()) == ["0.bias", "0.weight"]
    assert torch.equal(plain[0].weight, made.weight)
    assert len(made.parametrizations) == 1


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(4, 3))
    model.seen = model(torch.ones(1, 4))
    with pytest.raises(ModelError, match="Sequential cannot be copied: Only Tensors created"):
        plain_copy(model)


def test_a_spectral_norm_is_copied_as_it_evaluates():
    made = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).train()
    state = {name: value.clone() for name, value in made.state_dict().items()}
    plain = plain_copy(made)
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert torch.equal(plain.weight, made.eval().weight)


def test_vectors_are_the_plain_one_dimensional_parameters_each_once():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].bias = model[0].bias
    model.scalar = nn.Parameter(torch.ones(()))
    found = {site.name: site for site in vectors(model)}
    assert list(found) == ["0.bias", "1.weight", "1.bias"]
    assert len(found["0.bias"].uses) == 2
    assert [s.name for s in vectors(model, include="BatchNorm1d")] == ["1.weight", "1.bias"]
    assert [s.name for s in vectors(model, exclude=["1.*", "nothing"])] == ["0.bias"]
