"""What training can be told: averages, accumulation, precision, patience; and where it fails."""

import math

import pytest
import torch
from torch import nn

from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods import run
from tersor.task import classification, regression
from tersor.train import Labels, Regime, Training, fit
from tersor.train.callbacks import trainer_callback
from tersor.train.lessons import standardized
from tersor.train.states import Average
from train.test_loop import blobs, net, trained


def falling():
    """A judge that is ever happier, so that the last state is kept."""
    verdicts = iter(range(10_000, 0, -1))
    return lambda: float(next(verdicts))


def test_the_average_is_that_of_a_loop_written_out():
    task = classification(train=blobs(), batch_size=32)
    model = nn.Linear(2, 3)
    twin = nn.Linear(2, 3)
    twin.load_state_dict(model.state_dict())
    lessons = Labels(task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = {"ema": 0.5, "schedule": "constant", "warmup": 0.0}
    fit(
        model, optimizer, lessons, lambda lesson: lessons.loss(model(lesson.inputs), lesson),
        epochs=3, judge=falling(), generator=torch.Generator().manual_seed(0), training=training,
    )  # fmt: skip

    average = [p.detach().clone() for p in twin.parameters()]
    generator, other = torch.Generator().manual_seed(0), torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(9):
        if step % 3 == 0:
            batches = iter(list(task.train(generator)))
        inputs, labels = next(batches)
        other.zero_grad()
        nn.functional.cross_entropy(twin(inputs), labels).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        other.step()
        decay = min(0.5, (2 + step) / (11 + step))
        average = [
            decay * a + (1 - decay) * p.detach()
            for a, p in zip(average, twin.parameters(), strict=True)
        ]
    for p, a in zip(model.parameters(), average, strict=True):
        assert torch.allclose(p, a, atol=1e-6)


def test_accumulated_batches_make_the_step_of_one_large_batch():
    found = []
    for size, accumulate in ((24, 4), (96, 1)):
        task = classification(train=blobs(), batch_size=size)
        model = nn.Linear(2, 3)
        with torch.no_grad():
            model.weight.fill_(0.1)
            model.bias.zero_()
        fitted = trained(
            model, Labels(task), judge=falling(), epochs=2, training={"accumulate": accumulate}
        )
        assert fitted.steps == 2
        found.append(model.weight)
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_few_bits_learn_too_and_weights_stay_as_wide(precision):
    task = classification(train=blobs(192), test=blobs(seed=1), batch_size=32)
    model = net().train()
    seen = set()
    model[0].register_forward_hook(lambda layer, args, out: seen.add(out.dtype))
    trained(model, Labels(task), judge=falling(), epochs=6, training={"precision": precision})
    assert getattr(torch, precision) in seen
    assert model[0].weight.dtype == torch.float32
    assert task.evaluate(model.eval())["accuracy"] > 80


def test_patience_ends_it():
    verdicts = iter([5.0, 3.0, 4.0, 3.5, 1.0, 1.0])
    task = classification(train=blobs(), batch_size=32)
    fitted = trained(
        net().train(),
        Labels(task),
        judge=lambda: next(verdicts),
        epochs=9,
        training={"patience": 2},
    )
    assert (fitted.epoch, fitted.after, fitted.steps) == (1, 3.0, 9)
    assert fitted.curve.judged == [5.0, 3.0, 4.0, 3.5]


def test_the_curve_is_that_of_the_losses_and_stays_short():
    task = classification(train=blobs(), batch_size=1)
    losses = []
    lessons, model = Labels(task), net().eval()

    def loss(lesson):
        value = lessons.loss(model(lesson.inputs), lesson)
        losses.append(float(value.detach()))
        return value

    fitted = fit(
        model, torch.optim.SGD(model.parameters(), lr=0.01), lessons, loss,
        epochs=10, judge=falling(), generator=torch.Generator(),
    )  # fmt: skip
    curve = fitted.curve
    assert (len(losses), curve.stride, len(curve.losses)) == (960, 4, 240)
    assert curve.losses[1] == pytest.approx(sum(losses[4:8]) / 4)


class Half(Regime):
    """Ready in the second half; then the first weight is 7."""

    def begin(self, model, steps):
        self.model, self.steps, self.seen = model, steps, 0

    def after(self, step):
        self.seen = step + 1

    def enforce(self):
        if self.settled:
            with torch.no_grad():
                self.model[0].weight[0, 0] = 7.0

    @property
    def settled(self):
        return self.seen > self.steps // 2


def test_no_state_counts_before_a_regime_has_settled():
    task = classification(train=blobs(), batch_size=32)
    verdicts = iter([1.0, 2.0, 3.0, 5.0, 4.0])
    model = net().train()
    fitted = trained(model, Labels(task), judge=lambda: next(verdicts), regimes=[Half()])
    assert (fitted.epoch, fitted.after) == (4, 4.0)
    assert model[0].weight[0, 0] == 7.0


class Weight(Regime):
    """Weights are to be small, and no gradient reaches the biases."""

    def begin(self, model, steps):
        self.model = model

    def penalty(self, step):
        return 0.05 * self.model.weight.square().sum()

    def gradients(self, step):
        self.model.bias.grad.zero_()


def test_a_regime_adds_to_the_loss_and_sees_gradients():
    task = classification(train=blobs(), batch_size=32)
    model, twin = nn.Linear(2, 3), nn.Linear(2, 3)
    twin.load_state_dict(model.state_dict())
    before = model.bias.detach().clone()
    training = {"schedule": "constant", "warmup": 0.0, "clip": 1e9}
    trained(model, Labels(task), judge=falling(), regimes=[Weight()], epochs=1, training=training)
    assert torch.equal(model.bias, before)
    optimizer = torch.optim.Adam([twin.weight], lr=0.05)
    for inputs, labels in task.train(torch.Generator().manual_seed(0)):
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(twin(inputs), labels)
        (value + 0.05 * twin.weight.square().sum()).backward()
        optimizer.step()
    assert torch.allclose(model.weight, twin.weight, atol=1e-6)


@pytest.mark.parametrize("when", [3, 20])
def test_an_exploding_loss_stops_it(when):
    task = classification(train=blobs(), batch_size=4)
    model, lessons, seen = net().train(), Labels(task), []

    def loss(lesson):
        seen.append(None)
        value = lessons.loss(model(lesson.inputs), lesson)
        return value * (1e6 if len(seen) == when else 1)

    with pytest.raises(ModelError, match=rf"step {when} of 48: the loss is .*e\+0.* lower rate"):
        fit(
            model, torch.optim.SGD(model.parameters(), lr=0.1), lessons, loss,
            epochs=2, judge=falling(), generator=torch.Generator(),
        )  # fmt: skip


def test_a_dead_network_stops_it():
    task = classification(train=blobs(), batch_size=4)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    with pytest.raises(ModelError, match=r"step 20 of 96: no gradient has reached"):
        trained(model, Labels(task))


def test_overflow_of_float16_is_left_out_until_no_scale_helps():
    task = classification(train=blobs(), batch_size=4)
    model, lessons = net().train(), Labels(task)
    bad = [True] * 3

    class Burst(Regime):
        def gradients(self, step):
            if bad:
                bad.pop()
                model[0].weight.grad[0, 0] = math.inf

    before = model[0].weight.detach().clone()
    fitted = trained(
        model, lessons, judge=falling(), regimes=[Burst()], epochs=1,
        training={"precision": "float16"},
    )  # fmt: skip
    assert fitted.steps == 24
    assert model[0].weight.isfinite().all()
    assert not torch.equal(model[0].weight, before)
    bad.extend([True] * 99)
    with pytest.raises(ModelError, match="length of the gradient is"):
        trained(
            model, lessons, judge=falling(), regimes=[Burst()], epochs=4,
            training={"precision": "float16"},
        )  # fmt: skip


def test_no_batches_is_said():
    class Empty(Labels):
        def __len__(self):
            return 0

    with pytest.raises(TaskError, match="no batches to train on"):
        trained(net(), Empty(classification(train=blobs())))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"emma": 0.9}, r"training=.*: emma: "),
        ({"ema": 1.0}, r"training=.*: ema: Input should be less than 1"),
        ({"precision": "int8"}, r"training=.*: precision: "),
        ({"accumulate": 0}, r"training=.*: accumulate: "),
    ],
)
def test_wrong_settings_are_named(given, said):
    with pytest.raises(OptionError, match=said):
        Training.of(given)


def test_standardized_logits_have_mean_0_and_deviation_1():
    rows = standardized(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert torch.allclose(rows[0].mean(), torch.tensor(0.0), atol=1e-6)
    assert torch.allclose(rows[0].std(correction=0), torch.tensor(1.0))
    assert torch.equal(rows[1], torch.zeros(3))


def test_a_student_that_answers_as_its_teacher_is_not_dead():
    x = torch.randn(96, 4)
    model = nn.Linear(4, 2)
    task = regression(calibration=x, holdout=x[:16])
    steps = [{"method": "distill.logits", "options": {"epochs": 12}}]
    done = run(model, steps, task, original=model)
    assert not done.recipe.steps[-1].outcome["kept"]


def test_a_loss_without_a_slope_stops_it():
    task = classification(train=blobs(), batch_size=32)
    model, lessons = net(), Labels(task)
    with pytest.raises(ModelError, match="depends on no weight"):
        fit(
            model, torch.optim.SGD(model.parameters(), lr=0.1), lessons,
            lambda lesson: lessons.loss(model(lesson.inputs).detach(), lesson),
            epochs=1, judge=falling(), generator=torch.Generator(),
        )  # fmt: skip


def test_a_judge_that_says_nan_stops_it():
    with pytest.raises(ModelError, match="held-out inputs give NaN"):
        trained(net(), Labels(classification(train=blobs(), batch_size=32)), judge=lambda: math.nan)


def test_averages_of_few_bits_move():
    values = [torch.ones(3, dtype=torch.bfloat16)]
    average = Average(values, 0.999)
    values[0] += 0.2
    for _ in range(5000):
        average.add()
    with average.shown():
        assert torch.allclose(values[0].float(), torch.full((3,), 1.2), atol=1e-2)
        values[0][0] = 0
    assert torch.allclose(values[0].float(), torch.full((3,), 1.2), atol=1e-2)
    assert float(average.values[0][0]) == 0
    assert float(average.values[0][1]) == pytest.approx(1.2, abs=1e-2)


def test_a_mask_of_infinities_is_no_part_of_an_average():
    mask = torch.tensor([0.0, -torch.inf])
    weight = torch.zeros(2)
    average = Average([mask, weight], 0.5)
    weight.fill_(1.0)
    average.add()
    assert average.values[0].tolist() == [0.0, -math.inf]
    assert average.values[1].tolist() == pytest.approx([9 / 11, 9 / 11])


def test_a_judge_that_comes_to_say_infinity_stops_it():
    lessons = Labels(classification(train=blobs(), batch_size=32))
    with pytest.raises(ModelError, match="held-out inputs give answers that are infinitely far"):
        trained(net(), lessons, epochs=2, judge=iter([1.0, math.inf]).__next__)
    # It is where training had to begin.
    assert (
        trained(net(), lessons, epochs=2, judge=iter([math.inf, math.inf, 1.0]).__next__).after == 1
    )


def test_settings_are_checked_before_the_first_step():
    steps = [
        {"method": "quantize.rtn"},
        {"method": "distill.logits", "options": {"training": {"emma": 1}}},
    ]
    with pytest.raises(OptionError, match=r"step 2 of 2, distill.logits: training="):
        run(net(), steps)


def test_the_trainer_is_told_that_it_cannot_go_on():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    callback = trainer_callback(Regime())
    state = transformers.TrainerState(global_step=3, max_steps=9)
    with pytest.raises(OptionError, match="goes on at step 3"):
        callback.on_train_begin(None, state, None, model=net())
