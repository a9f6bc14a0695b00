"""Recipes: what is noted, what is refused, and in which order steps may come."""

import json
from typing import Literal

import pytest
import torch
import yaml
from torch import nn

from tersor.codec import save
from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods import TABLE, read_recipe, replay, run
from tersor.methods.quantize.rtn import rtn
from tersor.recipe import Recipe, Step, method, recipe_of
from tersor.task import classification


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def step(name, **options):
    return {"method": name, "options": options}


def test_a_step_is_noted_with_all_its_options():
    model = rtn(net(), bits=4, include=("0",))
    assert recipe_of(model).as_json() == [
        {
            "method": "quantize.rtn",
            "options": {
                "bits": 4,
                "group_size": None,
                "symmetric": True,
                "per_tensor": False,
                "include": ["0"],
                "exclude": None,
            },
        }
    ]


def test_steps_follow_each_other():
    model = run(net(), [step("prune.magnitude"), step("quantize.rtn", bits=4)])
    assert [s.method for s in recipe_of(model).steps] == ["prune.magnitude", "quantize.rtn"]
    rtn(model, bits=3)
    assert [s.options.get("bits") for s in recipe_of(model).steps] == [None, 4, 3]


def test_json_and_back():
    recipe = Recipe([Step("quantize.rtn", {"bits": 4}), Step("x.y", {}, {"kept": False, "n": 0.5})])
    text = json.dumps(recipe.as_json())
    assert Recipe.from_json(json.loads(text)) == recipe
    assert "outcome" not in recipe.as_json()[0]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"method": "quantize.rtn"}, "a list of steps, not dict"),
        ("quantize.rtn", "a list of steps, not str"),
        (["quantize.rtn"], "step 1 of the recipe is 'quantize.rtn'"),
        ([{"options": {}}], "step 1"),
        ([{"method": "a.b"}, {"method": "a.b", "bits": 4}], "step 2"),
        ([{"method": "a.b", "options": [4]}], r"a.b: options=\[4\] is not a mapping"),
        ([{"method": "a.b", "outcome": 1}], "a.b: outcome=1 is not a mapping"),
    ],
)
def test_what_is_no_recipe_is_refused(data, named):
    with pytest.raises(OptionError, match=named):
        Recipe.from_json(data)


REFUSED = [
    ([], "no steps"),
    ("quantize.rtn", "a list of steps, not str"),
    (
        [step("quantize.rtm")],
        "step 1 of 1: there is no method 'quantize.rtm'; did you mean 'quantize.rtn'",
    ),
    ([step("zip")], "there is no method 'zip'; The methods are"),
    ([step("quantize.rtn", bit=4)], "no option 'bit'; did you mean 'bits'"),
    ([step("quantize.rtn", task=4)], "no option 'task'"),
    ([step("quantize.rtn", bits="4")], "bits='4' should be a valid integer"),
    ([step("quantize.rtn", bits=4.5)], "bits=4.5 should be a valid integer"),
    ([step("quantize.rtn", bits=True)], "bits=True should be a valid integer"),
    ([step("quantize.rtn", bits=9)], "bits=9 should be less than or equal to 8"),
    ([step("quantize.rtn", bits=0)], "bits=0 should be greater than or equal to 1"),
    ([step("quantize.rtn", group_size=0)], "group_size=0 should be greater than or equal to 1"),
    ([step("quantize.rtn", symmetric="yes")], "symmetric='yes' should be a valid boolean"),
    ([step("quantize.rtn", include=3)], "include=3 should be"),
    ([step("prune.magnitude", sparsity=1)], "sparsity=1 should be less than 1"),
    ([step("prune.magnitude", sparsity=0.0)], "sparsity=0.0 should be greater than 0"),
    ([step("prune.magnitude", sparsity=float("nan"))], "sparsity=nan should be"),
    ([step("prune.magnitude", scope="net")], "scope='net' should be 'layer' or 'global'"),
    ([step("share.kmeans", values=257)], "values=257 should be less than or equal to 256"),
    ([step("share.kmeans", values=1)], "values=1 should be greater than or equal to 2"),
    ([step("recover.batchnorm")], "nothing has been compressed yet"),
    (
        [step("quantize.rtn"), step("prune.magnitude")],
        "step 2 of 2, prune.magnitude: cannot follow quantize.rtn, because .*; move it before",
    ),
    ([step("share.kmeans"), step("prune.magnitude")], "cannot follow share.kmeans"),
    (
        [step("quantize.rtn", include="Conv2d")],
        "step 1 of 1, quantize.rtn: include='Conv2d' matches",
    ),
    (
        [step("prune.magnitude"), step("quantize.rtn", per_tensor=True, group_size=4)],
        "step 2 of 2, quantize.rtn: per_tensor=True and group_size=4 contradict",
    ),
]


@pytest.mark.parametrize(("recipe", "named"), REFUSED)
def test_a_recipe_that_cannot_work_is_refused_and_nothing_is_touched(recipe, named):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OptionError, match=named):
        run(model, recipe)
    assert not hasattr(model, "recipe")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_the_last_step_is_checked_before_the_first_one_runs(monkeypatch):
    started = []
    monkeypatch.setitem(TABLE, "prune.magnitude", method(_watching(started)))
    with pytest.raises(OptionError, match="step 2 of 2"):
        run(net(), [step("prune.magnitude"), step("quantize.rtn", bits=9)])
    assert started == []


def _watching(started):
    def magnitude(model: nn.Module, task: object = None) -> nn.Module:
        started.append(model)
        return model

    return magnitude


def test_order_counts_the_steps_that_a_model_has_been_through():
    model = rtn(net(), bits=4)
    with pytest.raises(OptionError, match="which this model has been through already"):
        run(model, [step("prune.magnitude")])


def test_run_leaves_the_given_model_alone():
    model = net()
    weight = model[0].weight
    out = run(model, Recipe([Step("quantize.rtn", {"bits": 2})]))
    assert model[0].weight is weight
    assert type(model[0]) is nn.Linear
    assert not torch.equal(out[0].weight, weight)
    assert recipe_of(model).steps == []


def test_run_takes_steps_as_objects_and_as_mappings():
    first = run(net(), [Step("quantize.rtn", {"bits": 2})])
    second = run(net(), [step("quantize.rtn", bits=2)])
    assert torch.equal(first[0].weight, second[0].weight)
    assert first.recipe == second.recipe


def test_weights_that_are_not_finite_are_refused():
    model = net()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"2.weight.*NaN"):
        run(model, [step("quantize.rtn")])


def test_a_step_without_the_data_it_needs_is_refused():
    with pytest.raises(TaskError, match=r"step 2 of 2, recover.batchnorm: .* pass a task"):
        run(net(), [step("quantize.rtn"), step("recover.batchnorm")])


def test_other_errors_say_in_which_step_they_came(monkeypatch):
    def rtn(model: nn.Module, task: object = None) -> nn.Module:
        raise ZeroDivisionError

    monkeypatch.setitem(TABLE, "quantize.rtn", rtn)
    with pytest.raises(ZeroDivisionError) as raised:
        run(net(), [step("quantize.rtn")])
    assert raised.value.__notes__ == ["in step 1 of 1, quantize.rtn"]


def test_direct_calls_are_checked_like_recipes():
    with pytest.raises(OptionError, match=r"quantize.rtn: bits=9 should be less"):
        rtn(net(), bits=9)
    with pytest.raises(OptionError, match=r"quantize.rtn: there is no option 'group'"):
        rtn(net(), group=4)


def test_a_recipe_is_read_alike_from_yaml_json_and_a_tersor_file(tmp_path):
    model = run(net(), [step("prune.magnitude"), step("share.kmeans", values=4)])
    plain = model.recipe.as_json()
    (tmp_path / "a.json").write_text(json.dumps(plain))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(plain))
    save(model, tmp_path / "a.tersor", graph=False)
    for name in ("a.json", "a.yaml", "a.tersor"):
        assert read_recipe(tmp_path / name) == model.recipe


def test_replay_reads_a_json_file(tmp_path):
    model = run(net(), [step("prune.magnitude"), step("share.kmeans", values=4)])
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(model.recipe.as_json()))
    for twin in (replay(net(), path), replay(net(), str(path)), replay(net(), model.recipe)):
        assert torch.equal(twin[0].weight, model[0].weight)
        assert twin.recipe == model.recipe


@pytest.mark.parametrize("text", ["{", '{"method": 1}', None])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "recipe.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match=r"the recipe .*recipe.json cannot be read: .+"):
        replay(net(), path)


@method
def noisy(
    model: nn.Module,
    task: object = None,
    *,
    size: float = 0.1,
    kind: Literal["normal"] = "normal",
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A technique with randomness, as a test needs one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return model


def test_a_generator_is_noted_as_the_seed_that_replays_it():
    used = torch.Generator().manual_seed(5)
    torch.rand(3, generator=used)
    first = noisy(net(), generator=used)
    second = noisy(net(), generator=used)
    assert not torch.equal(first[0].weight, second[0].weight)
    for model in (first, second):
        seed = model.recipe.steps[0].options["generator"]
        assert torch.equal(noisy(net(), generator=seed)[0].weight, model[0].weight)


def test_without_a_generator_the_seed_is_zero():
    model = noisy(net())
    assert model.recipe.steps[0].options == {"size": 0.1, "kind": "normal", "generator": 0}
    assert torch.equal(model[0].weight, noisy(net(), generator=0)[0].weight)


def test_a_technique_of_someone_else_is_named_by_its_module():
    assert noisy(net()).recipe.steps[0].method.endswith("test_recipe.noisy")


@pytest.mark.parametrize("first", ["cut.channels", "factorize.svd"])
@pytest.mark.parametrize("recovery", ["recover.polish", "recover.bias", "recover.batchnorm"])
def test_recoveries_by_layer_work_behind_other_shapes(first, recovery):
    torch.manual_seed(0)
    x = torch.randn(320, 8)
    task = classification(calibration=x[:256], holdout=x[256:])
    hidden = (nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    model = nn.Sequential(*hidden, nn.Linear(16, 5)).eval()
    steps = [
        {"method": first, "options": {"keep": 0.6}},
        {"method": "prune.magnitude", "options": {"sparsity": 0.5}},
        {"method": recovery},
    ]
    outcome = run(model, steps, task).recipe.steps[-1].outcome
    better = outcome["divergence_after"] <= outcome["divergence_before"]
    assert outcome["kept"] == better


def test_a_compiled_network_is_told_apart():
    model = torch.compile(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="_orig_mod"):
        run(model, [{"method": "quantize.rtn"}])


def test_a_step_that_learned_from_another_network_is_not_replayed_without_it():
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    task = classification(calibration=inputs[:48], holdout=inputs[48:])
    torch.manual_seed(1)
    student, teacher, other = (nn.Sequential(nn.Linear(16, 4)) for _ in range(3))
    recipe = [
        {"method": "distill.logits", "options": {"epochs": 2, "rate": 0.01}},
        {"method": "quantize.rtn", "options": {}},
    ]
    done = run(student, recipe, task, original=teacher)
    noted = Recipe.from_json(json.loads(json.dumps(done.recipe.as_json())))
    assert "original" not in noted.steps[1].outcome
    for missing in (None, other):
        with pytest.raises(
            OptionError, match=r"distill\.logits was done with original=Sequential "
        ):
            replay(student, noted, task, original=missing)
    twin = replay(student, noted, task, original=teacher)
    assert torch.equal(twin[0].weight, done[0].weight)
    assert twin.recipe == done.recipe
    plain = run(student, recipe[1:])
    assert replay(student, plain.recipe, original=teacher).recipe == plain.recipe
