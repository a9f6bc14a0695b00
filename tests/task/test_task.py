import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.errors import OptionError, TaskError
from tersor.task import classification, evaluation_mode, image_classification, regression
from tersor.task.data import pieces


def points(rows=100, seed=0):
    """Points of the plane; the label says on which side of a line they lie."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()


def sides():
    """A network that tells the two sides apart without an error."""
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
        net.bias.zero_()
    return net


class Answers(nn.Module):
    """Gives the inputs' sides in the shape that `form` makes of them."""

    def __init__(self, form):
        super().__init__()
        self.net, self.form = sides(), form

    def forward(self, x):
        return self.form(self.net(x))


def all_of(batches):
    return torch.cat(list(batches))


# Splits


def test_splits_that_are_missing_come_from_train_and_never_share_a_sample():
    x, y = torch.arange(2000.0)[:, None], torch.zeros(2000, dtype=torch.long)
    task = classification((x[:10], y[:10]), (x, y))
    calibration, holdout = all_of(task.calibration()), all_of(task.holdout())
    assert (len(calibration), len(holdout)) == (512, 256)
    assert not set(calibration.flatten().tolist()) & set(holdout.flatten().tolist())
    assert task.notes == ["calibration and holdout: taken from the inputs of train"]


@pytest.mark.parametrize(("rows", "sizes"), [(1, (1, 0)), (2, (1, 1)), (100, (25, 25))])
def test_test_inputs_stand_in_with_a_note(rows, sizes):
    task = classification(points(rows))
    assert sum(map(len, task.calibration())) == sizes[0]
    assert sum(map(len, task.holdout())) == sizes[1]
    assert "figures on test are optimistic" in task.notes[0]
    assert len(task.notes) == (2 if rows == 1 else 1)


def test_calibration_alone_gives_half_to_holdout():
    x, _ = points(40)
    task = classification(calibration=x)
    both = all_of([*task.calibration(), *task.holdout()])
    assert sorted(both.tolist()) == sorted(x.tolist())
    assert sum(map(len, task.holdout())) == 20
    assert task.notes == ["holdout: taken from the inputs of calibration"]
    assert not task.has_test


def test_given_splits_are_used_as_they_are():
    x, y = points(90)
    task = classification((x[:30], y[:30]), calibration=x[30:60], holdout=(x[60:], y[60:]))
    assert torch.equal(all_of(task.calibration()), x[30:60])
    assert torch.equal(all_of(task.holdout()), x[60:])
    assert task.notes == []


def test_calibration_stops_at_the_sample_asked_for():
    task = classification(points(), calibration=points(100)[0], holdout=points(5)[0], batch_size=40)
    assert [len(batch) for batch in task.calibration()] == [40, 40, 20]
    assert [len(batch) for batch in task.calibration(50)] == [40, 10]
    assert torch.equal(task.example(3), points(100)[0][:3])


def test_a_task_without_labels_says_so():
    task = classification(calibration=points()[0])
    with pytest.raises(TaskError, match=r"no test data; give test=\(inputs, targets\)"):
        task.test()
    with pytest.raises(TaskError, match="no train data"):
        task.evaluate(sides(), on="train")
    with pytest.raises(OptionError, match="on='holdout' has no labels"):
        task.evaluate(sides(), on="holdout")
    with pytest.raises(TaskError, match="there is no data"):
        classification()


def test_training_batches_are_shuffled_by_the_generator_alone():
    task = regression(train=(torch.arange(50.0)[:, None], torch.arange(50.0)), batch_size=8)

    def order(generator=None):
        return torch.cat([targets for _, targets in task.train(generator)]).tolist()

    shuffled = order(torch.Generator().manual_seed(1))
    assert order() == sorted(shuffled) != shuffled
    assert shuffled == order(torch.Generator().manual_seed(1))


# Loaders


@pytest.mark.parametrize("form", [tuple, list, lambda pair: {"x": pair[0], "labels": pair[1]}])
def test_a_loader_of_pairs_or_dictionaries_serves_as_a_split(form):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = sides()

        def forward(self, x):
            return self.net(x)

    x, y = points(60)
    batches = [form((x[i : i + 16], y[i : i + 16])) for i in range(0, 60, 16)]
    loader = DataLoader(batches, batch_size=None)
    assert classification(loader).evaluate(Net())["accuracy"] == 100


def test_a_shuffling_loader_is_read_in_order_for_test():
    x, y = points(60)
    task = classification(DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True))
    assert torch.equal(all_of(inputs for inputs, _ in task.test()), x)
    assert sum(map(len, task.calibration())) == sum(map(len, task.holdout())) == 15
    assert not set(all_of(task.calibration())[:, 0].tolist()) & set(
        all_of(task.holdout())[:, 0].tolist()
    )


def test_a_generator_is_refused_because_it_can_be_read_only_once():
    with pytest.raises(TaskError, match="test is a generator, which can be read only once"):
        classification(points() for _ in range(2))


def test_a_dictionary_without_targets_lists_its_keys():
    task = classification([{"x": points()[0], "truth": points()[1]}], calibration=points()[0])
    with pytest.raises(TaskError, match=r"\['truth', 'x'\], none of which is one of labels"):
        task.evaluate(sides())


# Predictions


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: logits,
        lambda logits: (logits, "more"),
        lambda logits: {"logits": logits, "other": logits},
        lambda logits: SimpleNamespace(logits=logits),
    ],
)
def test_logits_are_found_in_what_a_model_gives(form):
    task = classification(points())
    x, y = next(task.test())
    outputs = task.predict(Answers(form), x)
    assert torch.equal(outputs, sides()(x))
    assert torch.equal(task.labels(outputs), y)


@pytest.mark.parametrize("form", [lambda z: z[:, 1], lambda z: z[:, 1:]])
def test_one_value_per_sample_is_the_logit_of_class_1(form):
    task = classification(points())
    assert task.evaluate(Answers(form))["accuracy"] == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_probabilities_of_any_precision_are_read_as_such(dtype):
    class Soft(nn.Module):
        def forward(self, x):
            return x.softmax(1)

    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    task = classification(calibration=logits, batch_size=500)
    said = task.predict(Soft(), logits).softmax(1)
    assert (said - logits.float().softmax(1)).abs().max() < 0.01


def test_a_lone_probability_is_noted_and_a_lone_logit_is_not():
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    for layer, notes in ((nn.Identity(), 0), (nn.Sigmoid(), 1)):
        task = classification(calibration=x)
        task.predict(layer, x)
        assert sum("one value from 0 to 1" in note for note in task.notes) == notes


def test_probabilities_are_read_as_such_and_noted():
    task = classification(points())
    x, _ = next(task.test())
    outputs = task.predict(Answers(lambda z: z.softmax(1)), x)
    assert torch.allclose(outputs.softmax(1), sides()(x).softmax(1), atol=1e-6)
    assert task.notes[-1] == "the model gives probabilities; their logarithms are used as logits"


def test_inputs_in_tuples_and_dictionaries_reach_the_model():
    class Two(nn.Module):
        def forward(self, left, right):
            return left + right

    x, _ = points()
    for inputs in ((x, x), {"left": x, "right": x}):
        task = regression((inputs, 2 * x))
        assert task.evaluate(Two())["mae"] == 0
        example = task.example(3)
        outputs = Two()(**example) if isinstance(example, dict) else Two()(*example)
        assert torch.equal(outputs, task.predict(Two(), example))


def test_float64_arrays_meet_float32_models():
    x, y = points()
    task = classification((x.double().numpy(), y.numpy().astype(np.uint8)))
    assert task.example().dtype == torch.float32
    assert task.evaluate(sides())["accuracy"] == 100


def test_evaluation_leaves_the_modes_of_the_model_alone():
    net = nn.Sequential(nn.Dropout(0.5), sides())
    net.train()
    net[1].eval()
    assert classification(points()).evaluate(net)["accuracy"] == 100
    assert (net.training, net[0].training, net[1].training) == (True, True, False)
    with evaluation_mode(net):
        assert not net.training
        assert not torch.is_grad_enabled()


def test_predict_keeps_gradients_for_training():
    net, task = sides(), classification(train=points())
    x, y = next(task.train())
    task.loss(task.predict(net, x), task.targets(x, y)).backward()
    assert net.weight.grad.abs().sum() > 0


# Divergence


def test_kl_equals_the_sum_over_classes():
    first, second = torch.randn(9, 5), torch.randn(9, 5)
    p, q = first.double().softmax(1), second.double().softmax(1)
    expected = [
        sum(a * (a / b).log() for a, b in zip(*pair, strict=True)).item()
        for pair in zip(p, q, strict=True)
    ]
    apart = classification(points()).divergence(first, second)
    assert apart.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_class_that_both_rule_out_adds_nothing_and_nan_is_infinitely_far():
    task = classification(points())
    masked = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert task.divergence(masked, masked).tolist() == [0]
    assert task.divergence(masked, torch.full((1, 3), torch.nan)).tolist() == [torch.inf]


def test_regression_divergence_is_relative_to_the_spread_of_the_reference():
    task = regression((torch.ones(4, 1), torch.ones(4)))
    # Variances 1 and 100, errors 1 and 10: each row is off by its whole spread.
    reference = torch.tensor([[1.0, 10.0], [-1.0, -10.0]])
    assert task.divergence(reference, reference + torch.tensor([1.0, 10.0])).tolist() == [1, 1]
    # Where the reference never varies its mean square stands in.
    assert task.divergence(torch.full((2, 1), 2.0), torch.full((2, 1), 3.0)).tolist() == [0.25] * 2
    assert task.divergence(torch.zeros(1, 1), torch.ones(1, 1)).tolist() == [1]


# Fingerprints


def test_a_split_without_samples_has_no_batches():
    task = classification(calibration=points()[0][:1])
    assert task.holdout() == []
    assert [len(batch) for batch in task.calibration()] == [1]


def test_fingerprints_tell_data_and_settings_apart():
    x, y = points()
    same = classification((x, y)).fingerprint()
    assert same == classification((x.clone(), y.clone())).fingerprint()
    changed = x.clone()
    changed[99, 1] += 1e-6
    others = [
        classification((changed, y)),
        classification((x, 1 - y)),
        classification((x, y), metrics=["f1"]),
        classification((x, y), classes=["left", "right"]),
    ]
    assert len({same, *(task.fingerprint() for task in others)}) == 5


def test_fingerprints_tell_which_inputs_are_held_out():
    x, y = points()
    prints = {
        classification((x, y), calibration=x[:some], holdout=x[some:other]).fingerprint()
        for some, other in ((40, 60), (40, 61), (50, 60))
    }
    assert len(prints) == 3


def test_fingerprints_agree_between_processes():
    code = (
        "import torch; from tersor.task import classification\n"
        "x = torch.arange(20.0).reshape(10, 2)\n"
        "print(classification((x, torch.arange(10) % 2)).fingerprint())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    x = torch.arange(20.0).reshape(10, 2)
    assert done.stdout.strip() == classification((x, torch.arange(10) % 2)).fingerprint()


# Refusals


X, Y = points(10)
BAD = X.clone()
BAD[7, 1] = torch.nan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classification((X[:0], Y[:0])), "test inputs: there are no samples"),
        (lambda: classification((X, Y[:9])), "test has 10 inputs but 9 targets"),
        (lambda: classification((BAD, Y)), "test inputs: sample 7 has a NaN or an infinity"),
        (lambda: classification((X, Y), calibration=BAD), "calibration inputs: sample 7"),
        (lambda: classification((X, Y.float())), r"labels are float32 of shape \(10,\)"),
        (lambda: classification((X, torch.eye(10).long())), r"shape \(10, 10\).*argmax"),
        (lambda: classification((X, Y - 1)), "labels hold -1; labels count from 0"),
        (
            lambda: classification((X, Y), classes=["a"]),
            "hold 1; .* from 0 to 0, the last of the 1",
        ),
        (lambda: classification(X), r"lacks its targets; give test=\(inputs, targets\)"),
        (lambda: classification((X, None)), r"lacks its targets; give test=\(inputs, targets\)"),
        (lambda: classification((np.array(["a", 1], object), Y[:2])), "dtype object holds no num"),
        (lambda: classification(([[1.0], [1.0, 2.0]], Y[:2])), "different shapes"),
        (lambda: classification(({"a": X, "b": X[:4]}, Y)), "differ in length: .*'b': 4"),
        (lambda: regression((X, BAD[:, 1])), "test targets: sample 7 has a NaN"),
    ],
)
def test_data_that_cannot_be_used_is_refused(make, message):
    with pytest.raises(TaskError, match=message):
        make()


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, "8"])
def test_a_batch_size_is_a_positive_whole_number(batch_size):
    with pytest.raises(OptionError, match=r"batch_size=.* at least 1"):
        classification((X, Y), batch_size=batch_size)


def test_nan_from_a_loader_is_refused_when_it_comes():
    task = classification([(X, Y), (BAD, Y)], calibration=X)
    with pytest.raises(TaskError, match="sample 7 has a NaN"):
        task.evaluate(sides())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(10, 3), r"inputs of shape \(10, 3\), float32; torch says: mat1 and mat2"),
        (torch.ones(10, 2, dtype=torch.uint8), r"shape \(10, 2\), uint8; torch says:"),
        ((X, X), r"0 shape \(10, 2\), float32; 1 shape .* torch says: .*positional argument"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused_with_both_named(data, message):
    task = classification((data, Y))
    with pytest.raises(TaskError, match=f"the model does not accept this data: .*{message}"):
        task.evaluate(sides())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_model_in_another_precision_is_told_the_way_out(dtype):
    with pytest.raises(TaskError, match=r"float32: call model.float\(\) first"):
        classification((X, Y)).evaluate(sides().to(dtype))


def test_labels_beyond_the_models_classes_are_refused():
    with pytest.raises(TaskError, match="labels reach 12 but the model gives 2 classes"):
        classification((X, Y + 11)).evaluate(sides())


def test_outputs_of_the_wrong_shape_are_refused():
    flat, task = Answers(lambda z: z.flatten()), classification((X, Y))
    with pytest.raises(TaskError, match=r"outputs of shape \(20,\) for 10 samples"):
        task.evaluate(flat)
    with pytest.raises(TaskError, match="the model gives a str"):
        task.evaluate(Answers(lambda z: "yes"))
    with pytest.raises(TaskError, match=r"2 values .* targets have shape \(10, 1\)"):
        regression((X, Y.float())).evaluate(sides())


@pytest.mark.parametrize(("count", "rows"), [(33, 32), (65, 32), (101, 32), (5, 4), (1, 32)])
def test_pieces_are_about_as_large_as_each_other(count, rows):
    parts = list(pieces([torch.arange(count)], rows))
    assert torch.equal(torch.cat(parts), torch.arange(count))
    assert max(map(len, parts)) <= rows
    assert count == 1 or min(map(len, parts)) > 1


@pytest.mark.parametrize("count", [34, 66, 6, 100])
def test_pairs_stay_together_in_pieces(count):
    assert all(len(part) % 2 == 0 for part in pieces([torch.arange(count)], 32))


def test_held_out_labels_judge_training_and_are_not_needed():
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    model = torch.nn.Linear(4, 3)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(x[40:]), y[40:])
    task = classification(train=(x[:40], y[:40]), holdout=(x[40:], y[40:]), batch_size=7)
    assert task.validate(model) == pytest.approx(float(expected), rel=1e-5)
    assert classification(train=(x[:40], y[:40]), holdout=x[40:]).validate(model) is None
    pixels = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8)
    data = (pixels, y[:20])
    pictures = image_classification(train=data, holdout=data, layout="NCHW")
    assert pictures.validate(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)))


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 10])
@pytest.mark.parametrize("batch", [1, 4])
def test_batches_are_counted_without_reading_them(rows, batch):
    task = classification(train=(torch.randn(rows, 2), torch.arange(rows) % 2), batch_size=batch)
    assert task.train_batches() == len(list(task.train()))


def test_a_loader_is_asked_how_many_batches_it_has():
    class Counted:
        def __iter__(self):
            raise AssertionError("it was read")

        def __len__(self):
            return 7

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(2), torch.tensor(0))] * 6)

    held = torch.randn(4, 2)
    given = {"calibration": held, "holdout": held}
    assert classification(train=Counted(), **given).train_batches() == 7
    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    assert classification(train=loader, **given).train_batches() == 2


def test_a_loader_without_an_end_is_refused(monkeypatch):
    class Endless:
        def __iter__(self):
            while True:
                yield torch.randn(2, 2), torch.tensor([0, 1])

    monkeypatch.setattr("tersor.task.data.MOST_BATCHES", 50)
    held = torch.randn(4, 2)
    task = classification(train=Endless(), calibration=held, holdout=held)
    with pytest.raises(TaskError, match=r"gives more than 50 batches, so .* no end; give it a"):
        task.train_batches()


class Noisy(torch.utils.data.Dataset):
    """Draws what it adds from torch, numpy and Python, as augmentations do."""

    def __len__(self):
        return 40

    def __getitem__(self, at):
        if at >= 40:
            raise IndexError
        drawn = torch.rand(3) + np.random.rand() + random.random()
        return at + drawn, at % 2


def test_a_task_of_a_loader_that_draws_is_the_same_in_each_process():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        task = classification(train=DataLoader(Noisy(), batch_size=8, shuffle=True))
        found.append(task.fingerprint())
        # What draws behind it goes on as it would have.
        after = torch.rand(()), np.random.rand(), random.random()
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        assert after == (torch.rand(()), np.random.rand(), random.random())
    assert found[0] == found[1]
