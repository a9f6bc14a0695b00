"""The training loop: its schedule, its choice of a state, and what it does where training fails."""

import math

import pytest
import torch
from torch import nn

from tersor.errors import ModelError, TaskError
from tersor.task import classification
from tersor.train import Labels, Lesson, Regime, Training, answers, fit


def blobs(n: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds in the plane."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
    return centres[labels] + torch.randn(n, 2, generator=generator), labels


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def trained(model, lessons, *, judge=None, epochs=4, seed=0, rate=0.05, **options):
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    return fit(
        model,
        optimizer,
        lessons,
        lambda lesson: lessons.loss(lessons.task.predict(model, lesson[0]), lesson),
        epochs=epochs,
        judge=judge or (lambda: 0.0),
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def test_the_rate_rises_on_a_line_and_falls_on_half_a_cosine():
    # 2 of 10 steps are warm-up; 8 remain, of which the middle one has half of the rate.
    cosine = Training(warmup=0.2)
    assert [cosine.rate(step, 10) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    assert cosine.rate(9, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert cosine.rate(10, 10) == 0.0


def test_a_line_falls_to_zero_and_a_constant_does_not():
    line, constant = Training("linear", warmup=0.2), Training("constant", warmup=0)
    assert [line.rate(step, 10) for step in (1, 2, 6, 10)] == [1.0, 1.0, 0.5, 0.0]
    assert [constant.rate(step, 10) for step in (0, 9)] == [1.0, 1.0]


def test_it_does_what_a_loop_written_out_does():
    task = classification(train=blobs(), batch_size=32)
    model, twin = net(), net()
    # A judge that is ever happier, so that the last state is kept.
    verdicts = iter([3.0, 2.0, 1.0])
    trained(
        model.train(), Labels(task), epochs=2, judge=lambda: next(verdicts), training={"clip": 0.1}
    )

    optimizer = torch.optim.Adam(twin.parameters(), lr=0.05)
    generator, step = torch.Generator().manual_seed(0), 0
    for _ in range(2):
        for inputs, labels in task.train(generator):
            for group in optimizer.param_groups:
                # 6 steps, of which one is warm-up.
                group["lr"] = 0.05 * (0.5 * (1 + math.cos(math.pi * max(0, step - 1) / 5)))
            optimizer.zero_grad()
            nn.functional.cross_entropy(twin(inputs), labels).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            optimizer.step()
            step += 1
    for key, value in twin.state_dict().items():
        assert torch.allclose(model.state_dict()[key], value, atol=1e-6), key


def test_the_state_that_was_judged_best_is_left_behind():
    task = classification(train=blobs(), batch_size=32)
    model, states = net().train(), []
    verdicts = iter([5.0, 3.0, 1.0, 2.0, 1.0])

    def judge():
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return next(verdicts)

    fitted = trained(model, Labels(task), judge=judge)
    assert (fitted.before, fitted.after, fitted.epoch, fitted.steps) == (5.0, 1.0, 2, 12)
    for key, value in states[2].items():
        assert torch.equal(model.state_dict()[key], value)
    assert not torch.equal(states[3]["0.weight"], states[2]["0.weight"])


def test_the_start_stays_where_nothing_was_better():
    task = classification(train=blobs(), batch_size=32)
    model, before = net(), net().state_dict()
    assert trained(model.train(), Labels(task)).epoch == 0
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    task = classification(train=blobs(), batch_size=32)
    found = []
    for seed in (1, 1, 2):
        verdicts = iter(range(9, 0, -1))
        model = net().train()
        trained(model, Labels(task), seed=seed, judge=lambda left=verdicts: float(next(left)))
        found.append(model[0].weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_answers_teach_what_labels_would():
    teacher = net(1).train()
    labels = Labels(classification(train=blobs(300), batch_size=32))
    verdicts = iter(range(99, 0, -1))
    trained(teacher, labels, epochs=8, judge=lambda: float(next(verdicts)))
    task = classification(calibration=blobs(seed=1)[0], holdout=blobs(9)[0], test=blobs(seed=2))
    lessons = answers(teacher.eval(), task, task.calibration())
    assert [len(lesson.answer) for lesson in lessons.given] == [32, 32, 32]
    student = net(2).eval()

    def apart():
        with torch.no_grad():
            x = blobs(seed=1)[0]
            return float(lessons.loss(student(x), Lesson(x, answer=teacher(x))))

    fitted = trained(student, lessons, epochs=20, judge=apart)
    assert fitted.after < 0.1 * fitted.before
    assert task.evaluate(student)["accuracy"] == pytest.approx(
        task.evaluate(teacher)["accuracy"], abs=3
    )


@pytest.mark.parametrize("failure", ["not finite", "interrupted"])
def test_where_training_stops_the_best_state_is_back(failure):
    task = classification(train=blobs(), batch_size=32)
    model = net().train()
    lessons, seen, states = Labels(task), [], []

    def loss(lesson):
        seen.append(None)
        value = lessons.loss(model(lesson[0]), lesson)
        if len(seen) == 5 and failure == "interrupted":
            raise KeyboardInterrupt
        return value * math.inf if len(seen) == 5 else value

    def judge():
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return 1.0 / len(states)

    raised = {"not finite": ModelError, "interrupted": KeyboardInterrupt}[failure]
    said = r"step 5 of 12: the loss is inf; .* lower rate" if raised is ModelError else None
    with pytest.raises(raised, match=said):
        fit(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lessons,
            loss,
            epochs=4,
            judge=judge,
            generator=torch.Generator(),
        )
    assert len(states) == 2
    assert all(torch.equal(model.state_dict()[key], states[1][key]) for key in states[1])


def test_without_inputs_there_is_nothing_to_learn_from():
    task = classification(calibration=blobs()[0])
    with pytest.raises(TaskError, match="no calibration inputs to learn from"):
        answers(net(), task, [])


def test_a_loader_that_gives_less_than_it_says_is_told_where_a_regime_has_a_plan():
    class Short(Labels):
        def __len__(self) -> int:
            return 40

    short = Short(classification(train=blobs(), batch_size=16))

    class Paced(Regime):
        paced = True

    trained(net(), short, epochs=1, regimes=[Regime()])
    with pytest.raises(TaskError, match="epoch 1 had 6 batches of 40: the loader gives fewer"):
        trained(net(), short, epochs=1, regimes=[Paced()])


def test_an_average_starts_anew_where_weights_leapt():
    class Leaping(Regime):
        def after(self, step: int) -> None:
            self.step = step
            if step == 2:
                with torch.no_grad():
                    model[0].weight.mul_(100)

        @property
        def leapt(self) -> bool:
            return self.step == 2

    model, seen = net(), []

    def judge() -> float:
        seen.append(float(model[0].weight.detach().abs().mean()))
        return -len(seen)

    lessons = Labels(classification(train=blobs(), batch_size=16))
    trained(
        model, lessons, judge=judge, epochs=1, rate=1e-4, regimes=[Leaping()],
        training={"ema": 0.999},
    )  # fmt: skip
    # An average with what was before would be far below.
    assert seen[1] > 90 * seen[0]
