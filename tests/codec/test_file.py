"""What is saved comes back: every form, layer and name, with or without the model's code."""

import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import zoo
from tersor.codec import load, read_header, read_tensor, save, save_tensors, verify
from tersor.errors import ExportError, FileError, ModelError, OptionError
from tersor.forms import (
    Affine,
    Bitmask,
    BitPlanes,
    BlockFloat,
    Codebook,
    Dense,
    FakeAffine,
    Form,
    NofM,
)
from tersor.program import program_of
from tersor.program.of_model import call_arguments
from tersor.recipe import Recipe, Step
from tersor.surgery import decoded, form_of, hold, walk


def sparse(weight):
    """Two of every four neighbours set to zero."""
    groups = weight.detach().reshape(weight.shape[0], -1, 4)
    order = groups.abs().argsort(-1)
    return groups.scatter(-1, order[..., :2], 0).reshape(weight.shape)


def nested(outer, inner):
    return hold(outer, "codes", inner(outer.codes))


def low_level_nested(weight):
    """Three deep: codes held by a bitmask whose values are held by a codebook's codes."""
    affine = Affine.encode(sparse(weight), bits=3)
    mask = Bitmask.encode(affine.codes)
    values = Dense.encode(weight.new_tensor([1.0]), dtype=torch.float16)
    assert values.stored.numel() == 1
    hold(mask, "values", Codebook.encode(mask.values.float(), torch.arange(-4.0, 4.0)))
    mask._modules["values_form"].dtype = torch.int8
    return hold(affine, "codes", mask)


def fractions(weight):
    """Codes whose zero points are no whole numbers."""
    form = Affine.encode(weight, bits=4, group_size=5, symmetric=False)
    return Affine(
        form.codes,
        form.scale.detach(),
        form.zero.half() + 0.25,
        **form.config(),
        shape=form.shape,
        dtype=form.dtype,
        zero_bits=16,
    )


FORMS = {
    "affine": lambda w: Affine.encode(w, bits=4),
    "affine groups": lambda w: Affine.encode(w, bits=3, group_size=5, symmetric=False),
    "affine tensor": lambda w: Affine.encode(w, bits=1, axis=None),
    "affine fractions": fractions,
    "affine axis": lambda w: Affine.encode(w, bits=8, axis=1),
    "planes": lambda w: BitPlanes.encode(w, planes=3, group_size=5),
    "planes axis": lambda w: BitPlanes.encode(w, axis=1),
    "nvfp4": BlockFloat.encode,
    "mxfp4 axis": lambda w: BlockFloat.encode(w, format="mxfp4", axis=1),
    "nvfp4 of a bitmask": lambda w: nested(BlockFloat.encode(sparse(w)), Bitmask.encode),
    "codebook": lambda w: Codebook.encode(w, torch.linspace(-1, 1, 11)),
    "dense": lambda w: Dense.encode(w, dtype=torch.bfloat16),
    "dense e4m3": lambda w: Dense.encode(w, dtype=torch.float8_e4m3fn),
    "dense scales": lambda w: Dense.encode_scaled(w, dtype=torch.float8_e5m2),
    "dense scale": lambda w: Dense.encode_scaled(w, dtype=torch.float8_e4m3fn, axis=None),
    "bitmask": lambda w: Bitmask.encode(sparse(w)),
    "nofm": lambda w: NofM.encode(sparse(w), n=2, m=4),
    "bitmask of codes": lambda w: nested(Affine.encode(sparse(w), bits=4), Bitmask.encode),
    "nofm of codes": lambda w: nested(
        Affine.encode(sparse(w), bits=4), lambda c: NofM.encode(c, n=2, m=4)
    ),
    "three deep": low_level_nested,
}


def assert_same_form(form, other):
    assert type(form).kind == type(other).kind
    assert (form.shape, form.dtype, form.config()) == (other.shape, other.dtype, other.config())
    assert form.stored_bits() == other.stored_bits()
    for name, _ in form.parts():
        inner, again = (f._modules.get(f"{name}_form") for f in (form, other))
        assert isinstance(inner, Form) == isinstance(again, Form)
        if isinstance(inner, Form):
            assert_same_form(inner, again)
        assert torch.equal(getattr(form, name), getattr(other, name))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_comes_back_equal(tmp_path, name):
    net = nn.Sequential(nn.Conv1d(8, 6, 3), nn.ReLU()).eval()
    form = FORMS[name](net[0].weight)
    hold(net[0], "weight", form)
    path = save(net, tmp_path / "net.tersor", example=torch.rand(2, 8, 9))
    free = load(path)
    assert_same_form(form, form_of(free.get_submodule("0"), "weight"))
    into = load(path, into=nn.Sequential(nn.Conv1d(8, 6, 3), nn.ReLU()))
    assert_same_form(form, form_of(into[0], "weight"))
    x = torch.rand(5, 8, 20)
    assert torch.equal(free(x), net(x))
    assert torch.equal(into(x), net(x))
    assert free.training is False
    assert into.training is False


class Odd(nn.Module):
    """Tied and shared weights, odd buffers, a bare parameter, no shape, nothing in it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embed.weight
        self.twice = nn.ModuleList([nn.Linear(4, 4)] * 2)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mask", torch.rand(9) < 0.5)
        self.register_buffer("limit", torch.tensor([-torch.inf, 3.0]))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("hidden", torch.tensor([0.5] * 4), persistent=False)
        self.narrow = nn.Parameter(torch.rand(3).half(), requires_grad=False)

    def forward(self, ids):
        x = self.embed(ids) * self.gain + self.hidden
        for layer in self.twice:
            x = layer(x).clamp(min=self.limit[0])
        return self.head(x)


def test_every_parameter_and_buffer_comes_back(tmp_path):
    net = Odd()
    path = save(net, tmp_path / "net.tersor", example=torch.arange(4)[None])
    for other in (load(path), load(path, into=Odd())):
        state = other.state_dict()
        assert state.keys() == net.state_dict().keys()
        for name, tensor in net.state_dict().items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)
        ids = torch.randint(0, 10, (3, 5))
        assert torch.equal(other(ids), net(ids))
    assert load(path, into=Odd()).narrow.requires_grad is False


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    net = Odd()
    for site in walk(net):
        site.hold(Affine.encode(site.weight, bits=5))
    path = save(net, tmp_path / "net.tersor", example=torch.arange(4)[None])
    shared = [entry.names for entry in read_header(path).entries if len(entry.names) > 1]
    assert ("embed.weight", "head.weight") in shared
    assert ("twice.0.weight", "twice.1.weight") in shared
    for other in (load(path), load(path, into=Odd())):
        assert form_of(other.embed, "weight") is form_of(other.head, "weight")
        ids = torch.randint(0, 10, (3, 5))
        assert torch.equal(other(ids), net(ids))
    plain = load(save(Odd(), tmp_path / "plain.tersor", example=torch.arange(4)[None]))
    assert plain.embed.weight is plain.head.weight


def test_a_loaded_model_saves_to_the_same_bytes(tmp_path):
    net = Odd()
    for site in walk(net, exclude="twice.*"):
        site.hold(Affine.encode(site.weight, bits=3))
    first = save(net, tmp_path / "a.tersor", example=torch.arange(4)[None], metrics={"top1": 91.5})
    loaded = load(first)
    second = save(loaded, tmp_path / "b.tersor", metrics=loaded.metrics)
    assert second.read_bytes() == first.read_bytes()
    traced = save(loaded, tmp_path / "c.tersor", example=torch.arange(4)[None])
    ids = torch.randint(0, 10, (3, 5))
    assert torch.equal(load(traced)(ids), net(ids))


def test_notes_come_back(tmp_path):
    net = nn.Linear(2, 2)
    net.recipe = Recipe([Step("quantize.rtn", {"bits": 4}, {"kept": True})])
    notes = {"metrics": {"top1": 0.1, "größe": [1, None]}, "provenance": {"data": "a\nb"}}
    path = save(net, tmp_path / "net.tersor", **notes)
    loaded = load(path, into=nn.Linear(2, 2))
    assert loaded.recipe == net.recipe
    assert loaded.metrics == notes["metrics"]
    header = read_header(path)
    assert header.provenance == notes["provenance"]
    assert header.recipe == net.recipe.as_json()
    assert header.writer == "0.1.0"
    assert header.program_bytes == 0
    given = [{"method": "share.kmeans", "options": {}}]
    assert read_header(save(net, path, recipe=given)).recipe == given


@pytest.mark.parametrize("option", ["metrics", "provenance"])
@pytest.mark.parametrize("value", [float("nan"), {1, 2}, torch.tensor(1.0)])
def test_notes_that_are_no_json_are_refused(tmp_path, option, value):
    with pytest.raises(OptionError, match=f"{option}=.* cannot be written as JSON"):
        save(nn.Linear(2, 2), tmp_path / "net.tersor", **{option: {"a": value}})


def test_the_header_says_what_is_inside(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    hold(net[0], "weight", Affine.encode(net[0].weight, bits=4))
    path = save(net, tmp_path / "net.tersor", example=torch.rand(1, 3, 8, 8))
    header = verify(path)
    assert [(e.names[0], e.layer) for e in header.entries[:2]] == [
        ("0.bias", "Conv2d"),
        ("0.weight", "Conv2d"),
    ]
    held = header.entries[1].tensor
    assert (held.form, held.shape, held.config["bits"]) == ("affine", (8, 3, 3, 3), 4)
    assert header.file_bytes == path.stat().st_size
    assert header.program_bytes > 0
    total = sum(header.stored_bytes(entry) for entry in header.entries)
    assert total == pytest.approx(sum(chunk.length for chunk in header.chunks))


def test_a_file_without_a_graph_says_how_to_load_it(tmp_path):
    net = nn.Linear(3, 2)
    for path in (
        save(net, tmp_path / "a.tersor"),
        save(net, tmp_path / "b.tersor", example=torch.rand(1, 3), graph=False),
    ):
        with pytest.raises(FileError, match=r"saved without a graph.*load\(path, into=your_model"):
            load(path)
        assert torch.equal(load(path, into=nn.Linear(3, 2)).weight, net.weight)


class Choosing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_says_so(tmp_path):
    with pytest.raises(ExportError, match="graph=False"):
        save(Choosing(), tmp_path / "net.tersor", example=torch.rand(1, 2))
    assert list(tmp_path.iterdir()) == []
    save(Choosing(), tmp_path / "net.tersor", example=torch.rand(1, 2), graph=False)


def test_saving_changes_nothing(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    hold(net[0], "weight", Affine.encode(net[0].weight, bits=4))
    before, form = copy.deepcopy(net.state_dict()), form_of(net[0], "weight")
    example = torch.rand(6, 4)
    kept = example.clone()
    save(net, tmp_path / "net.tersor", example=example)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert net.training
    assert net[1].training
    assert form_of(net[0], "weight") is form
    assert form._decoded is None
    assert torch.equal(example, kept)


# Refusals of save


def test_a_name_that_a_rebuilt_model_needs_itself_is_refused_when_saving(tmp_path):
    net = nn.Sequential(OrderedDict(kind=nn.Linear(2, 2)))
    with pytest.raises(ExportError, match=r"cannot be .* a graph: .*kind.* already exists"):
        save(net, tmp_path / "net.tersor", example=torch.rand(1, 2))
    path = save(net, tmp_path / "net.tersor", graph=False)
    other = nn.Sequential(OrderedDict(kind=nn.Linear(2, 2)))
    assert torch.equal(load(path, into=other).kind.weight, net.kind.weight)


def test_a_program_of_another_model_is_refused(tmp_path):
    program = program_of(nn.Linear(3, 2), torch.rand(1, 3))
    with pytest.raises(ExportError, match=r"Conv1d cannot be rebuilt from a graph|uses the weight"):
        save(nn.Conv1d(3, 2, 1, bias=False), tmp_path / "net.tersor", graph=program)
    net = nn.Linear(3, 2)
    x = torch.rand(4, 3)
    path = save(net, tmp_path / "net.tersor", graph=program)
    assert torch.equal(load(path)(x), net(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        net[0].weight[1, 2] = bad
    says = (
        r'"0.weight" of shape \(2, 3\) holds 1 values that are NaN or infinite; load a checkpoint'
    )
    with pytest.raises(ModelError, match=says):
        save(net, tmp_path / "net.tersor", example=torch.rand(2, 3))
    net[0].weight = nn.Parameter(torch.zeros(2, 3))
    net[1].running_var[0] = torch.nan
    with pytest.raises(ModelError, match=r'"1.running_var" .* that are NaN;'):
        save(net, tmp_path / "net.tersor")
    assert list(tmp_path.iterdir()) == []


def test_training_forms_are_refused(tmp_path):
    net = nn.Linear(4, 4)
    form = FakeAffine.encode(net.weight, bits=4)
    hold(net, "weight", form)
    with pytest.raises(ModelError, match=r'"weight" is held by a Fake.* freeze\(\) it first'):
        save(net, tmp_path / "net.tersor")
    hold(net, "weight", form.freeze())
    loaded = load(save(net, tmp_path / "net.tersor"), into=nn.Linear(4, 4))
    assert torch.equal(loaded.weight, form.freeze().dense())


class Stranger(Dense):
    kind = "stranger"


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"scale": 1}


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "net.tersor"
    net = hold(nn.Linear(2, 2), "weight", Stranger(torch.zeros(2, 2), torch.float32))
    with pytest.raises(ModelError, match=r"held by a Stranger .* none of the forms a file knows"):
        save(net, path)
    with pytest.raises(ModelError, match="keeps extra state that is no tensor"):
        save(nn.Sequential(Extra(2, 2)), path)
    with pytest.raises(ModelError, match="ReLU has no parameters or buffers"):
        save(nn.ReLU(), path)
    with pytest.raises(ModelError, match="is on the meta device and has no values"):
        save(nn.Linear(2, 2, device="meta"), path)
    with pytest.raises(ModelError, match=r"not a torch.nn.Module; .* with tersor.codec.save_ten"):
        save({"a": torch.ones(2)}, path)
    with pytest.raises(OptionError, match=r"profile=\['max'\] is none of"):
        save(nn.Linear(2, 2), path, profile=["max"])
    assert not path.exists()


@pytest.mark.parametrize(
    ("items", "error", "says"),
    [
        ({"a": 3}, OptionError, '"a" is 3 and no tensor; make it one with torch.as_tensor'),
        ({3: torch.ones(2)}, OptionError, "the name 3; give a dict of text -> tensor"),
        ({"a": torch.ones(2, device="meta")}, ModelError, '"a" is on the meta device'),
        ({"a": torch.eye(2).to_sparse()}, ModelError, r'"a" .*sparse_coo.*; give its to_dense'),
    ],
)
def test_what_is_no_tensor_at_hand_is_refused(tmp_path, items, error, says):
    with pytest.raises(error, match=says):
        save_tensors(items, tmp_path / "a.tersor")
    assert list(tmp_path.iterdir()) == []


def test_conjugates_and_negatives_are_stored_as_what_they_are(tmp_path):
    tensor = torch.tensor([[1 + 2j, 3 - 4j, -5j]])
    items = {"conj": tensor.conj(), "neg": tensor.conj().imag}
    assert items["conj"].is_conj()
    assert items["neg"].is_neg()
    path = save_tensors(items, tmp_path / "a.tersor")
    assert all(torch.equal(read_tensor(path, name), item) for name, item in items.items())


# Loading into a module


def test_a_module_on_the_meta_device_is_filled(tmp_path):
    net = nn.Sequential(nn.LSTM(4, 6, batch_first=True, bidirectional=True))
    hold(net[0], "weight_hh_l0", Affine.encode(net[0].weight_hh_l0, bits=8))
    path = save(net, tmp_path / "net.tersor")
    with torch.device("meta"):
        other = nn.Sequential(nn.LSTM(4, 6, batch_first=True, bidirectional=True))
    x = torch.rand(2, 5, 4)
    assert torch.equal(load(path, into=other)(x)[0], net(x)[0])


def test_a_buffer_that_no_file_has_must_not_be_on_the_meta_device(tmp_path):
    path = save(Odd(), tmp_path / "net.tersor")
    with torch.device("meta"):
        other = Odd()
    with pytest.raises(ModelError, match=r'"hidden" .* is on the meta device and not part of'):
        load(path, into=other)


def weight_normed():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))


@pytest.mark.parametrize("kept", [True, False], ids=["plain", "held"])
def test_parametrized_weights_fit_their_own_class(tmp_path, kept):
    net = weight_normed()
    if not kept:
        for site in walk(net):
            site.hold(Affine.encode(site.weight, bits=8))
    path = save(net, tmp_path / "net.tersor", example=torch.rand(1, 4))
    x = torch.rand(3, 4)
    for other in (load(path), load(path, into=weight_normed())):
        assert torch.equal(other(x), net(x))


def test_a_held_weight_gives_way_to_what_the_file_has(tmp_path):
    net = nn.Linear(3, 2)
    path = save(net, tmp_path / "net.tersor")
    other = nn.Linear(3, 2)
    hold(other, "weight", Affine.encode(other.weight, bits=2))
    assert torch.equal(load(path, into=other).weight, net.weight)
    assert form_of(other, "weight") is None


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (nn.Linear(3, 2, bias=False), 'Linear lacks "bias", which the file has'),
        (nn.Linear(4, 2), r'"weight" has shape \(2, 3\) in the file and \(2, 4\) in the module'),
        (nn.BatchNorm1d(2), 'the file lacks "num_batches_tracked", "running_mean", "running_var"'),
        (nn.LSTM(3, 2), r'and 1 more, which LSTM has, and LSTM lacks "bias", "weight"'),
        (nn.Sequential(nn.Linear(3, 2)), 'lacks "0.bias", "0.weight", which Sequential has'),
    ],
)
def test_a_module_that_does_not_fit_is_told_why_and_left_alone(tmp_path, other, says):
    path = save(nn.Linear(3, 2), tmp_path / "net.tersor")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(FileError, match=says):
        load(path, into=other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_inputs_become_a_call():
    x, y = torch.rand(1), torch.rand(2)
    assert call_arguments(x) == ((x,), {})
    assert call_arguments((x, y)) == ((x, y), {})
    assert call_arguments({"a": x}) == ((), {"a": x})
    assert call_arguments(((x,), {"a": y})) == ((x,), {"a": y})


# Any model of these layers, stored any way


layers = st.lists(
    st.tuples(
        st.sampled_from(["linear", "conv", "norm", "lstm"]),
        st.sampled_from([None, *FORMS]),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25)
@given(layers, st.booleans())
def test_any_model_comes_back(tmp_path_factory, plan, tie):
    made = {
        "linear": lambda n: nn.Linear(4 * n, 8),
        "conv": lambda n: nn.Conv2d(4, 4 * n, 2),
        "norm": lambda n: nn.BatchNorm1d(n),
        "lstm": lambda n: nn.LSTM(4, 4 * n, 2),
    }

    def build():
        net = nn.ModuleDict({str(i): made[kind](n) for i, (kind, _, n) in enumerate(plan)})
        if tie:
            net["twin"] = net["0"]
        return net

    net = build()
    if any(kind != "norm" for kind, _, _ in plan):
        for site in walk(net):
            form = plan[int(site.name.partition(".")[0])][1]
            if form is not None:
                site.hold(FORMS[form](site.weight))
    path = save(net, tmp_path_factory.mktemp("any") / "net.tersor")
    other = load(path, into=build())
    state = other.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert save(other, path.with_name("again.tersor")).read_bytes() == path.read_bytes()


def test_resnet20_in_four_bits_is_a_tenth_of_its_size(tmp_path, shared_data):
    net = zoo.resnet20()
    for site in walk(net):
        site.hold(Affine.encode(site.weight, bits=4))
    path = save(net, tmp_path / "net.tersor", example=torch.rand(2, 3, 32, 32))
    dense = (shared_data / "weights" / "resnet20_cifar10.safetensors").stat().st_size
    assert path.stat().st_size < 0.105 * dense
    header = read_header(path)
    stored = sum(chunk.length for chunk in header.chunks)
    # Everything but weights: names, shapes, forms, the graph, checksums.
    assert path.stat().st_size - stored < 2000
    x = zoo.cifar10()[0][:8]
    with torch.no_grad(), decoded(net):
        assert torch.equal(load(path)(x), net(x))


@pytest.mark.parametrize("given", ["net", nn.Linear, {"weight": 1}])
def test_into_takes_the_network_itself(tmp_path, given):
    path = save(nn.Linear(2, 2), tmp_path / "a.tersor", graph=False)
    with pytest.raises(ModelError, match=r"into=.* is not a torch.nn.Module; build the network"):
        load(path, into=given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_an_empty_tensor_may_be_the_first_of_its_type(tmp_path, dtype):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("nothing", torch.empty(0, 5, dtype=dtype))
            self.last = nn.Linear(2, 2)

    model = Net()
    path = save(model, tmp_path / "a.tersor", graph=False)
    again = load(path, into=Net())
    assert again.nothing.shape == (0, 5)
    assert again.nothing.dtype == dtype
    assert torch.equal(again.last.weight, model.last.weight)
    verify(path)
