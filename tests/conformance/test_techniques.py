"""What every technique promises. The tests walk the table, so a new row is tested at once."""

import copy
import inspect
import json
import re

import pytest
import torch
from torch import Tensor, nn

from surgery.nets import Conv1D
from tersor.codec import load, read_header, save
from tersor.errors import ModelError, OptionError, TaskError
from tersor.forms import Form
from tersor.methods import TABLE, replay, run
from tersor.recipe import defaults_of, name_of
from tersor.surgery import walk
from tersor.surgery.chain import Chain
from tersor.task import Task, classification, language_model

every_technique = pytest.mark.parametrize("name", TABLE)

# A recovery makes nothing smaller, and comes after a step that does.
RECOVERIES = {name for name in TABLE if name.startswith(("recover.", "distill."))}
# A preparation makes nothing smaller either, and comes before.
PREPARATIONS = {name for name in TABLE if name.startswith("transform.")}
# Several plain layers take the place of one; no form holds a weight, and some layers stay whole.
CHAINS = {name for name in TABLE if name.startswith("factorize.")}
# What comes before a recovery that is not one from rounding.
BEFORE = {"recover.polish": {"method": "prune.magnitude", "options": {"sparsity": 0.5}}}
# One that holds no weight by a form: layers use those of others.
TIES = {"share.layers"}
# What is promised must hold after a few steps as well as after many.
QUICK = {
    "cut.group_lasso": {"epochs": 1},
    "prune.gradual": {"sparsity": 0.5, "epochs": 2},
    "prune.movement": {"sparsity": 0.5, "epochs": 2},
    "prune.l0": {"sparsity": 0.5, "epochs": 2},
    "prune.lottery": {"rounds": 2, "epochs": 1},
    "quantize.adaround": {"steps": 60},
    "quantize.lsq": {"epochs": 4},
    "quantize.rate": {"epochs": 4},
    "quantize.mixed": {"generations": 1},
    "distill.data_free": {"inputs": 16, "steps": 3},
}
# One that works on language alone, and one that makes up its inputs, which are numbers then.
SPEAKS, DREAMS = "distill.on_policy", "distill.data_free"
# What makes the network itself smaller, and may do so again.
CUTS = {name for name in TABLE if name.startswith("cut.")}
BLOCKS = [f"blocks.{n}.{layer}" for n in range(2) for layer in ("up", "down")]
# What learns from labels alone, since it starts from an untrained network.
LABELLED = {"prune.lottery"}
# One that stores something beside the weights, much less than they had before.
CORRECTIONS = {"recover.lqer"}


class Block(nn.Module):
    """Can be skipped, and its channels can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Everything(nn.Module):
    """One of each layer that keeps its weight in its own way; the embedding is also the output.

    `speaks`: it says something about each token, and not about all of them together
    """

    speaks = False

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.mix = Conv1D(16, 16)
        self.inner = nn.Linear(16, 16)
        self.output = nn.Linear(16, 24, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        # Numbers stand for mixtures of tokens.
        x = ids @ self.embedding.weight if ids.is_floating_point() else self.embedding(ids)
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2).relu()
        x = x + self.lstm(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = block(x)
        x = self.inner(self.mix(x).relu())
        return self.output(x if self.speaks else x.mean(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Everything().train()
    with torch.no_grad():
        for seed in range(20):
            model(ids(64, seed))
    return model.eval()


def ids(n: int, seed: int = 0) -> Tensor:
    return torch.randint(24, (n, 6), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def task(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Task:
    name = request.node.callspec.params["name"]
    if name == SPEAKS:
        monkeypatch.setattr(Everything, "speaks", True)
        return language_model(calibration=ids(128, 100), holdout=ids(64, 101))
    if name == DREAMS:
        return classification(calibration=torch.zeros(8, 6, 24))
    labelled = name in LABELLED
    train = {"train": (ids(128, 102), torch.arange(128) % 24)} if labelled else {}
    return classification(calibration=ids(128, 100), holdout=ids(64, 101), **train)


def steps(name: str, **options: object) -> list[dict[str, object]]:
    """The technique alone, a recovery behind a step that it can recover from."""
    rounded = {"method": "quantize.rtn", "options": {"bits": 3}}
    before = [copy.deepcopy(BEFORE.get(name, rounded))] if name in RECOVERIES else []
    return [*before, {"method": name, "options": {**QUICK.get(name, {}), **options}}]


def stored_bits(model: nn.Module) -> int:
    plain = {id(p): p.numel() * p.element_size() * 8 for p in model.parameters()}
    return sum(
        site.form.stored_bits() if site.form else plain[id(getattr(*site.uses[0]))]
        for site in walk(model)
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    """Every stored tensor is equal bit for bit, under the same names."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype
        for key in first
    )


def test_every_technique_is_named_by_its_file():
    for name, technique in TABLE.items():
        assert name_of(technique) == name
        assert inspect.getmodule(technique).__doc__.count("Source:") == 1


@every_technique
def test_options_are_few_have_defaults_and_are_explained(name):
    defaults = defaults_of(TABLE[name])
    # Which layers is one choice; how the loop trains is explained in one place for all.
    assert len(defaults.keys() - {"include", "exclude", "training", "generator"}) <= 5
    assert inspect.Parameter.empty not in defaults.values()
    json.dumps(defaults)
    for option in defaults:
        assert option in TABLE[name].__doc__


@every_technique
def test_the_same_call_gives_the_same_bits(name, task):
    assert same(run(net(), steps(name), task), run(net(), steps(name), task))


@every_technique
def test_the_recipe_replays_bit_for_bit(name, task):
    done = run(net(), steps(name), task)
    again = json.loads(json.dumps(done.recipe.as_json()))
    twin = replay(net(), again, task)
    assert same(done, twin)
    assert twin.recipe == done.recipe


@every_technique
def test_the_given_network_stays_as_it_is(name, task):
    model = net()
    before = copy.deepcopy(model.state_dict())
    types = [type(m) for m in model.modules()]
    out = run(model, steps(name), task)
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in out.parameters()}


@every_technique
def test_a_file_gives_the_network_back(name, task, tmp_path):
    done = run(net(), steps(name), task)
    path = save(done, tmp_path / "done.tersor", example=ids(2))
    with torch.no_grad():
        expected = done(ids(5, 7))
        for loaded in (load(path), load(path, into=net())):
            assert torch.allclose(loaded(ids(5, 7)), expected, rtol=1e-6, atol=1e-6)
    assert same(load(path, into=net()), done)
    assert read_header(path).recipe == done.recipe.as_json()
    assert same(replay(net(), path, task), done)


@every_technique
def test_torch_exports_what_it_makes(name, task):
    done = run(net(), steps(name), task)
    program = torch.export.export(done, (ids(2),)).module()
    with torch.no_grad():
        assert torch.allclose(program(ids(2)), done(ids(2)), rtol=1e-5, atol=1e-6)


@every_technique
def test_a_second_time_changes_nothing_or_is_refused(name, task):
    done = run(net(), steps(name), task)
    try:
        twice = run(done, [steps(name)[-1]], task, original=net())
    except OptionError:
        return
    if name in CUTS:
        assert stored_bits(twice) < stored_bits(done)
    elif name in RECOVERIES:
        # It may go on recovering, but never to a worse place.
        outcomes = [step.outcome for step in twice.recipe.steps if step.method == name]
        assert outcomes[1]["divergence_before"] <= outcomes[0]["divergence_before"]
    else:
        assert same(twice, done)


@every_technique
def test_it_stores_less_or_is_a_recovery(name, task):
    model = net()
    if name in CUTS:
        assert stored_bits(run(model, steps(name), task)) < stored_bits(model)
    elif name in RECOVERIES:
        compressed = stored_bits(run(model, steps(name)[:1]))
        done = run(model, steps(name), task)
        recovered = stored_bits(done)
        if name in CORRECTIONS:
            # What does not help on held-out inputs is taken back.
            assert (recovered > compressed) is done.recipe.steps[-1].outcome["kept"]
            assert recovered < 0.8 * stored_bits(model)
        else:
            assert recovered == compressed
    elif name in PREPARATIONS:
        assert stored_bits(run(model, steps(name), task)) == stored_bits(model)
    elif name in CHAINS | TIES:
        assert stored_bits(run(model, steps(name), task)) < stored_bits(model)
    else:
        assert stored_bits(run(model, steps(name), task)) < 0.8 * stored_bits(model)


@every_technique
def test_excluded_layers_are_left_alone(name, task):
    if "exclude" not in defaults_of(TABLE[name]):
        assert name in RECOVERIES
        return
    # Preparations need one linear layer that is free, and one more to share with.
    mix = [] if name in PREPARATIONS else ["Conv1D"]
    model, recipe = net(), steps(name, exclude=["lstm", "output", *mix])
    recipe[0]["options"]["exclude"] = recipe[-1]["options"]["exclude"]
    done = run(model, recipe, task)
    left = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "embedding.weight"]
    for path in [*left, "mix.weight"] if mix else left:
        assert torch.equal(done.get_parameter(path), model.get_parameter(path))
    if name in PREPARATIONS:
        return
    if name in CHAINS:
        chains = {path for path, layer in done.named_modules() if isinstance(layer, Chain)}
        assert chains
        assert chains <= {"conv", "inner", *BLOCKS}
        return
    if name in CUTS | TIES:
        assert stored_bits(done) < stored_bits(model)
        return
    changed = {site.name for site in walk(done) if site.form is not None}
    assert changed == {
        "conv.weight",
        "inner.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        *(f"{path}.weight" for path in BLOCKS),
    }


@every_technique
def test_a_pattern_that_matches_nothing_is_refused(name, task):
    if "include" not in defaults_of(TABLE[name]):
        assert name in RECOVERIES
        return
    last = len(steps(name))
    for option in ("include", "exclude"):
        where = f"step {last} of {last}, {name}"
        with pytest.raises(OptionError, match=rf"{where}: {option}='Conv9d'"):
            run(net(), steps(name, **{option: "Conv9d"}), task)


@every_technique
def test_unknown_options_and_wrong_types_are_refused(name, task):
    with pytest.raises(OptionError, match=f"{name}: there is no option 'strength'"):
        run(net(), steps(name, strength=1), task)
    for option in defaults_of(TABLE[name]):
        with pytest.raises(OptionError, match=f"{name}: {option}="):
            run(net(), steps(name, **{option: {"not": "this"}}), task)


@every_technique
def test_tied_weights_stay_tied(name, task):
    done = run(net(), steps(name), task)
    if name in PREPARATIONS | CHAINS | CUTS | TIES:
        assert done.output.weight is done.embedding.weight
        return
    assert done.output.weight_form is done.embedding.weight_form
    assert isinstance(done.output.weight_form, Form)
    assert torch.equal(done.output.weight, done.embedding.weight)


@every_technique
def test_outputs_stay_finite_and_of_the_same_shape(name, task):
    model = net()
    done = run(model, steps(name), task)
    with torch.no_grad():
        for n in (1, 64):
            after = done(ids(n, 3))
            assert after.shape == model(ids(n, 3)).shape
            assert torch.isfinite(after).all()


@every_technique
def test_weights_that_are_not_finite_are_refused_by_name(name, task):
    model = net()
    with torch.no_grad():
        model.inner.weight[3, 5] = float("nan")
    with pytest.raises(ModelError, match=r'"inner\.weight" of shape \(16, 16\) holds NaN .* in 1 '):
        TABLE[name](model, task)


@every_technique
def test_without_data_it_works_or_says_what_it_needs(name):
    needs = f"{name} pass a task"
    try:
        run(net(), steps(name))
    except TaskError as error:
        needs = str(error)
    assert re.search(rf"{re.escape(name)} .*pass a task", needs)


@every_technique
def test_dead_channels_and_weights_spoil_nothing(name, task):
    model = net()
    with torch.no_grad():
        model.inner.weight[3] = model.inner.bias[3] = 0
        model.inner.weight[:, 5] = model.output.weight[:, 3] = 0
        model.mix.weight.zero_()
    done = run(model, steps(name), task)
    assert done(ids(8)).isfinite().all()
    assert done.mix.weight.abs().max() < 1e-30
