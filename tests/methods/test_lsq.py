"""LSQ: what was trained is what is deployed, to the last bit, and it says on what it trained."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tersor.errors import ModelError, OptionError, TaskError
from tersor.forms import Affine, FakeAffine
from tersor.forms.grid import Grid
from tersor.measure import divergence_of, reference_outputs
from tersor.methods import run
from tersor.methods.quantize.lsq import Noise, lsq
from tersor.methods.sparse import Zeros
from tersor.surgery import walk
from tersor.surgery.grids import grid_of, grids
from tersor.task import Task, classification
from tersor.train import TrainingLog


def images(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise over one of four patterns."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    return patterns[labels] + torch.randn(n, 1, 8, 8, generator=generator), labels


def task(*, labels: bool = True) -> Task:
    train = images(256, 1)
    data = {"train": train} if labels else {"calibration": train[0]}
    return classification(**data, holdout=images(64, 2)[0], test=images(256, 3), batch_size=32)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A convolution net that knows the patterns."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(6):
        for inputs, labels in task().train(torch.Generator().manual_seed(0)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("labels", [True, False])
def test_freezing_changes_no_answer(net, labels):
    data = task(labels=labels)
    done = run(net, [{"method": "quantize.lsq", "options": {"epochs": 2}}], data)
    outcome = done.recipe.steps[-1].outcome
    assert outcome["trained_on"] == "labels and " * labels + "answers of the original"
    # The divergence that the best state had while it was trained is that of the frozen network.
    wanted = reference_outputs(net, data, data.holdout())
    after = divergence_of(done, data, data.holdout(), wanted)
    assert after - outcome["divergence_after"] == 0.0
    assert after < 0.5 * outcome["divergence_before"]
    assert all(isinstance(site.form, Affine) for site in walk(done))
    assert {type(grid) for _, _, _, grid in grids(done)} == {Grid}


def test_two_bits_keep_the_accuracy_of_the_network(net):
    data = task()
    done = lsq(copy.deepcopy(net), data, epochs=5)
    before, after = (data.evaluate(model)["accuracy"] for model in (net, done))
    assert before > 90
    assert after > before - 4


def test_bits_are_those_asked_for_and_others_at_both_ends(net):
    options = {"bits": 3, "activation_bits": 4, "ends": 7, "epochs": 1}
    done = lsq(copy.deepcopy(net), task(), **options)
    assert [site.form.bits for site in walk(done)] == [7, 3, 3, 7]
    layers = [done[0], done[3], done[7], done[9]]
    assert [grid_of(layer, "input").bits for layer in layers] == [7, 4, 4, 7]
    # Images have both signs; what a ReLU lets through has one.
    assert [grid_of(layer, "input").signed for layer in layers] == [True, False, False, False]


def test_weights_alone_and_only_some(net):
    done = lsq(copy.deepcopy(net), task(), activation_bits=None, epochs=1, exclude=["0", "Linear"])
    assert not list(grids(done))
    assert [site.form is not None for site in walk(done)] == [False, True, False, False]
    for name in ("0.weight", "0.bias", "7.weight", "7.bias", "9.weight"):
        assert torch.equal(done.get_parameter(name), net.get_parameter(name))
    only = lsq(copy.deepcopy(net), task(), epochs=1, include="3")
    assert not torch.equal(only[3].bias, net[3].bias)
    for name, tensor in net.named_parameters():
        assert name.startswith("3.") or torch.equal(only.get_parameter(name), tensor)
    for name, tensor in net.named_buffers():
        assert torch.equal(only.get_buffer(name), tensor)


def test_what_drops_out_follows_no_chance(net):
    model = nn.Sequential(*net[:8], nn.Dropout(0.5), *net[8:]).eval()
    first, second = (lsq(copy.deepcopy(model), task(), epochs=1) for _ in range(2))
    for old, new in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(old, new)


def test_the_network_is_left_as_it_was_but_for_its_values(net):
    model = copy.deepcopy(net)
    model[1].train()
    model[0].bias.requires_grad_(False)
    done = lsq(model, task(), epochs=1)
    assert [m.training for m in done] == [False, True, *[False] * 8]
    assert not done[0].bias.requires_grad
    assert done[1].weight.requires_grad
    assert all(p.grad is None for p in done.parameters())


def test_pruned_weights_stay_zero_and_cheap(net):
    prune = {"method": "prune.magnitude", "options": {"sparsity": 0.6}}
    step = {"method": "quantize.lsq", "options": {"bits": 4, "epochs": 2}}
    done = run(net, [prune, step], task())
    dense = run(net, [step], task())
    for before, after, other in zip(walk(run(net, [prune])), walk(done), walk(dense), strict=True):
        zeros = before.weight == 0
        assert zeros.any()
        assert not after.weight[zeros].any()
        assert not torch.equal(after.weight, before.weight)
        assert after.form.stored_bits() < other.form.stored_bits()


@pytest.mark.parametrize("method", ["quantize.lsq", "quantize.rate"])
def test_gradients_of_zeros_are_gone_whatever_averages_them(net, method, monkeypatch):
    # Processes that send thin matrices get gradients that are zero nowhere.
    seen, real = [], Zeros.gradients

    def filled(self, step):
        for latent, kept in self._kept:
            latent.grad.fill_(1.0)
            seen.append((latent.grad, kept))
        real(self, step)

    monkeypatch.setattr(Zeros, "gradients", filled)
    prune = {"method": "prune.magnitude", "options": {"sparsity": 0.6}}
    run(net, [prune, {"method": method, "options": {"epochs": 1}}], task())
    assert len(seen) == 4 * 8
    assert all(torch.equal(slope != 0, kept) and not kept.all() for slope, kept in seen[-4:])


def test_layers_called_by_keyword_get_grids_too():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.last(input=self.first(input=x.flatten(1)).relu())

    torch.manual_seed(0)
    done = lsq(Called(), task(), epochs=1)
    assert [where for where, *_ in grids(done)] == ["first", "last"]
    # Images have both signs; what a ReLU lets through has one.
    assert [grid.signed for *_, grid in grids(done)] == [True, False]


@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_noise_rounds_a_share_of_the_weights(net, noise):
    model = copy.deepcopy(net)
    for site in walk(model):
        site.hold(FakeAffine.encode(site.weight, bits=2, axis=site.axis))
    forms = [site.form for site in walk(model)]
    drawing = Noise(forms, noise, torch.Generator().manual_seed(0))
    drawing.begin(model, 1)
    first = [form.chosen for form in forms]
    # 2,120 weights: three standard errors are 0.033.
    assert abs(float(torch.cat([c.flatten() for c in first]).double().mean()) - noise) < 0.033
    drawing.after(0)
    assert not torch.equal(forms[2].chosen, first[2])
    with torch.no_grad():
        assert all(torch.equal(form.dense(), form.freeze().dense()) for form in forms)


def test_a_network_trained_with_noise_is_rounded_whole(net):
    data = task()
    done = lsq(copy.deepcopy(net), data, noise=0.5, epochs=5)
    assert all(len(site.weight.unique()) <= 3 * len(site.weight) for site in list(walk(done))[1:3])
    before, after = (data.evaluate(model)["accuracy"] for model in (net, done))
    assert after > before - 4
    plain = lsq(copy.deepcopy(net), data, epochs=5)
    assert not torch.equal(done[3].weight, plain[3].weight)


class Stop(Exception):
    pass


@pytest.mark.parametrize("step", [1, 8, 11])
def test_where_it_stops_makes_no_difference(net, step, tmp_path, monkeypatch):
    recipe = [{"method": "quantize.lsq", "options": {"epochs": 2, "noise": 0.5, "ends": 2}}]

    def trained(folder=None) -> nn.Module:
        return run(net, recipe, task(), log=TrainingLog(folder, minutes=0))

    expected, after = trained(), Noise.gradients

    def stopping(self, done):
        if done == step:
            raise Stop
        after(self, done)

    monkeypatch.setattr(Noise, "gradients", stopping)
    with pytest.raises(Stop):
        trained(tmp_path)
    monkeypatch.undo()
    found = trained(tmp_path)
    assert found.recipe.steps[-1].outcome == expected.recipe.steps[-1].outcome
    for (name, old), new in zip(
        expected.state_dict().items(), found.state_dict().values(), strict=True
    ):
        assert torch.equal(old, new), name


def test_training_that_fails_says_so(net):
    data = task()
    x, y = images(256, 1)
    broken = classification(train=(x, y), holdout=data.holdout()[0], batch_size=64)
    model = copy.deepcopy(net)
    broken.loss = lambda outputs, targets: outputs.sum() * float("nan")
    with pytest.raises(ModelError, match=r"step 1 of 4: the loss is nan"):
        lsq(model, broken, epochs=1)
    assert not list(grids(model))
    left = model.state_dict()
    assert left.keys() == net.state_dict().keys()
    assert all(torch.equal(left[name], old) for name, old in net.state_dict().items())


def test_what_a_training_had_reached_is_kept_as_plain_weights(net, tmp_path):
    data, calls = task(), []
    loss = data.loss

    def failing(outputs, targets):
        calls.append(None)
        return loss(outputs, targets) * (float("nan") if len(calls) == 13 else 1.0)

    data.loss = failing
    log = TrainingLog(tmp_path)
    with pytest.raises(ModelError, match="as it was behind epoch 1 is in"):
        lsq(copy.deepcopy(net), data, epochs=2, log=log)
    (path,) = tmp_path.glob("*.best.safetensors")
    kept = load_file(path)
    again = copy.deepcopy(net)
    again.load_state_dict(kept, strict=False)
    assert set(again.state_dict()) <= set(kept)
    assert len(again[3].weight.unique()) <= 3 * 8


def test_what_cannot_be_trained_is_refused(net):
    with pytest.raises(TaskError, match=r"quantize\.lsq needs inputs to run the network on"):
        lsq(copy.deepcopy(net))
    with pytest.raises(TaskError, match="the task has none"):
        lsq(copy.deepcopy(net), classification(calibration=images(1, 1)[0]))
    half = copy.deepcopy(net).half()
    with pytest.raises(ModelError, match=r'"0\.weight" of shape .* is float16'):
        lsq(half, task())
    assert all(site.form is None for site in walk(half))
    held = run(net, [{"method": "quantize.rtn", "options": {}}])
    with pytest.raises(OptionError, match=r'"0\.weight" of shape .* is held as affine already'):
        lsq(held, task())
    assert all(site.form is None for site in walk(net))


def test_a_scale_that_runs_away_is_named(net, monkeypatch):
    real = FakeAffine.dense

    def growing(form):
        with torch.no_grad():
            form.scale.mul_(4.0)
        return real(form)

    monkeypatch.setattr(FakeAffine, "dense", growing)
    with pytest.raises(ModelError, match=r'the scale of "0\.weight" is .* and began at '):
        lsq(copy.deepcopy(net), task(), epochs=3)
