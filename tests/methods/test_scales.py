"""Scales-only tuning: codes stay, what is trained is what is stored, and it never gets worse."""

import copy

import pytest
import torch
from torch import nn

from tersor.errors import OptionError, TaskError
from tersor.forms import Affine, Codebook, Dense, Trellis
from tersor.measure import divergence_of, reference_outputs
from tersor.methods import run
from tersor.methods.recover.scales import scales
from tersor.methods.tuning import Tuned, TunedNumbers, shown
from tersor.surgery import held, hold, walk
from tersor.task import classification, regression
from train.test_loop import blobs

RTN = {"method": "quantize.rtn", "options": {"bits": 2, "group_size": 8}}
TUNE = {"method": "recover.scales", "options": {"epochs": 3}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    ).eval()


def images(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def task():
    return classification(calibration=images(256, 1), holdout=images(64, 2))


STEPS = [
    RTN,
    {"method": "quantize.rtn", "options": {"bits": 3, "symmetric": False}},
    {"method": "share.kmeans", "options": {"values": 4}},
    {"method": "quantize.entropy", "options": {"bits": 2.0, "states": 4}},
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["method"])
def test_answers_come_closer_and_codes_and_bits_stay(step, task):
    original = net()
    before = run(original, [step], task)
    after = run(before, [TUNE], task, original=original)
    outcome = after.recipe.steps[-1].outcome
    assert outcome["kept"]
    assert outcome["divergence_after"] < outcome["divergence_before"]
    held_out = task.holdout()
    wanted = reference_outputs(original, task, held_out)
    # What was judged while it was trained is what is stored: to the last bit.
    assert divergence_of(after, task, held_out, wanted) == outcome["divergence_after"]
    assert divergence_of(before, task, held_out, wanted) == outcome["divergence_before"]
    for old, new in zip(walk(before), walk(after), strict=True):
        assert torch.equal(old.form.codes, new.form.codes)
        assert old.form.stored_bits() == new.form.stored_bits()
        for name in old.form.tunable():
            assert getattr(old.form, name).dtype == getattr(new.form, name).dtype
    assert [type(m) for m in before.modules()] == [type(m) for m in after.modules()]
    assert before.state_dict().keys() == after.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_narrow_floats_are_tuned_in_their_type(dtype):
    x, y = (images(n, seed).to(dtype) for n, seed in ((256, 1), (64, 2)))
    data, original = classification(calibration=x, holdout=y), net().to(dtype)
    done = run(original, [RTN, TUNE], data)
    outcome = done.recipe.steps[-1].outcome
    assert outcome["divergence_after"] < 0.8 * outcome["divergence_before"]
    wanted = reference_outputs(original, data, data.holdout())
    assert divergence_of(done, data, data.holdout(), wanted) == outcome["divergence_after"]
    assert {p.dtype for p in done.parameters() if p.dim() == 1} == {dtype}


def test_one_scale_finds_the_least_squares_answer():
    # weight = codes * s; with one scale and squared error the best s is <xc, xw> / <xc, xc>.
    torch.manual_seed(0)
    layer = nn.Linear(4, 1, bias=False)
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    quantized = copy.deepcopy(layer)
    form = Affine.encode(layer.weight, bits=2)
    form.scale = nn.Parameter(form.scale.float(), requires_grad=False)
    hold(quantized, "weight", form)
    codes, wanted = x @ form.codes[0].float(), x @ layer.weight[0].detach()
    best = float((codes @ wanted) / (codes @ codes))
    task = regression(calibration=x, holdout=x[:256])
    scales(quantized, task, original=layer, epochs=30, rate=0.02)
    assert form.scale.item() == pytest.approx(best, rel=0.02)


def test_vectors_stay_where_they_are_when_they_are_left_out(task):
    original = net()
    weights = {"method": "recover.scales", "options": {"epochs": 1, "vectors": False}}
    done = run(original, [RTN, weights], task)
    for (name, old), (_, new) in zip(
        ((n, p) for n, p in original.named_parameters() if p.dim() == 1),
        ((n, p) for n, p in done.named_parameters() if p.dim() == 1),
        strict=True,
    ):
        assert torch.equal(old, new), name
    moved = run(original, [RTN, TUNE], task)
    assert not torch.equal(moved[6].bias, original[6].bias)
    assert moved[1].running_mean.equal(original[1].running_mean)


def test_vectors_on_a_grid_are_rounded_to_it(task):
    original = net()
    entropy = {"method": "quantize.entropy", "options": {"bits": 2.0}}
    before = run(original, [entropy], task)
    after = run(before, [TUNE], task, original=original)
    moved = 0
    for (name, old), (_, new) in zip(held(before), held(after), strict=True):
        if len(old.shape) == 1:
            assert torch.equal(old.step, new.step), name
            moved += int((old.codes != new.codes).sum())
        else:
            assert torch.equal(old.codes, new.codes), name
    assert moved > 0


def test_a_vector_on_a_grid_worked_by_hand():
    # Size: the root of (4 + 4 + 16) / 3 = 8, 2.83. A tenth of it is 0.283: more than half a step.
    layer = nn.Linear(1, 3)
    hold(layer, "bias", Trellis.encode(torch.tensor([2.0, -2.0, 4.0]), step=0.5, axis=None))
    tuned = TunedNumbers(layer.bias_form)
    tuned.change.data += 0.1
    with shown([tuned]):
        assert layer.bias.tolist() == [2.5, -1.5, 4.5]
        (layer.bias * torch.tensor([1.0, 2.0, 0.0])).sum().backward()
    assert tuned.change.grad.tolist() == pytest.approx([8**0.5, 2 * 8**0.5, 0])
    assert layer.bias.tolist() == [2.0, -2.0, 4.0]
    tuned.store()
    assert layer.bias.tolist() == [2.5, -1.5, 4.5]


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        # Positive: times e**0.5. Of either sign: plus 0.5 of the root of the mean square, 5.
        ([1.0, 4.0], [1.6487212181091309, 6.594884872436523]),
        ([1.0, -7.0], [3.5, -4.5]),
        ([0.0, 0.0], [0.5, 0.5]),
    ],
)
def test_changes_worked_by_hand(start, expected):
    layer = nn.Linear(1, 2)
    layer.bias.data = torch.tensor(start)
    tuned = Tuned([(layer, "bias")])
    tuned.change.data += 0.5
    with shown([tuned]):
        assert layer.bias.tolist() == expected
    assert layer.bias.tolist() == start
    tuned.store()
    assert layer.bias.tolist() == expected


def test_zeros_of_a_codebook_stay_zeros():
    form = Codebook.encode(torch.randn(6, 6), torch.tensor([0.0, -1.0, 0.5, 2.0]))
    tuned = Tuned([(form, "values")], keep_zeros=True)
    tuned.change.data += 0.5
    tuned.store()
    assert form.values[0] == 0
    assert (form.values[1:] != torch.tensor([-1.0, 0.5, 2.0])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_shown_is_what_is_stored(dtype):
    form = Affine.encode(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), bits=4)
    form.scale = nn.Parameter(form.scale.to(dtype), requires_grad=False)
    tuned = Tuned([(form, "scale")])
    tuned.change.data += 0.3 * torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    with shown([tuned]):
        during = form.dense()
    tuned.store()
    assert form.scale.dtype == dtype
    assert torch.equal(form.dense(), during)


def test_only_floats_beside_codes_are_tunable():
    weight = torch.randn(4, 8)
    assert Affine.encode(weight, bits=4, symmetric=False).tunable() == ("scale",)
    assert Trellis.encode(weight, step=0.1).tunable() == ("step",)
    assert Dense.encode(weight, dtype=torch.bfloat16).tunable() == ()


def test_what_cannot_be_tuned_is_refused(task):
    with pytest.raises(TaskError, match="needs inputs"):
        scales(net())
    with pytest.raises(OptionError, match="original=network"):
        scales(net(), task)
    with pytest.raises(OptionError, match="behind a quantizing step"):
        scales(net(), task, original=net())
    with pytest.raises(OptionError, match="nothing to train"):
        scales(run(net(), [{"method": "quantize.cast"}]), task, original=net(), vectors=False)
    with pytest.raises(TaskError, match="held-out inputs and the task has none"):
        scales(net(), classification(calibration=images(1, 1)), original=net())


def test_shared_values_are_trained_on_labels_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x, y = blobs(512)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    task = classification(train=(x, y), test=blobs(512, seed=1), holdout=blobs(128, seed=2)[0])
    steps = [{"method": "share.kmeans", "options": {"values": 4}}]
    tuned = [*steps, {"method": "recover.scales", "options": {"on": "train"}}]
    before, after = (run(model, each, task) for each in (steps, tuned))
    apart = [nn.functional.cross_entropy(m(x), y).item() for m in (before, after)]
    assert apart[1] < apart[0]
    codes = [[site.form.codes for site in walk(m)] for m in (before, after)]
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))
    with pytest.raises(TaskError, match="labelled training data"):
        run(model, tuned, classification(calibration=x))
