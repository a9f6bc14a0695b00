"""Regimes beside loops that are not tersor's do there what they do in tersor's own."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tersor.codec import load, save
from tersor.errors import OptionError
from tersor.forms import Affine, Bitmask, SoftMask, Trellis
from tersor.forms.grid import Grid
from tersor.methods.own_loop import (
    gradual_pruning,
    lsq_training,
    movement_pruning,
    rate_penalty,
)
from tersor.surgery import held, walk
from tersor.surgery.grids import grids
from tersor.task import classification
from tersor.train import Lesson, Teacher
from tersor.train.callbacks import Beside, lightning_callback, trainer_callback
from train.test_loop import blobs


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))


def by_hand(model: nn.Module, regime, epochs: int = 6, stop: int | None = None) -> torch.Tensor:
    """Returns the network's answers before it was frozen. stop: after so many steps"""
    beside = Beside([regime])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = list(zip(*(part.split(16) for part in blobs(96)), strict=True)) * epochs
    beside.begin(model, len(batches))
    for x, y in batches[:stop]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        beside.gradients()
        optimizer.step()
        beside.after()
    found = answers(model)
    beside.finish()
    return found


@torch.no_grad()
def answers(model: nn.Module) -> torch.Tensor:
    return model(blobs(96)[0])


def in_lightning(model: nn.Module, regime, epochs: int = 6, *more, at=None, **options) -> None:
    """more: callbacks; at: the checkpoint to go on from"""
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=bool(more),
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[lightning_callback(regime), *more], **options,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(*blobs(96)), batch_size=16), ckpt_path=at)


class Rows(Dataset):
    def __init__(self) -> None:
        self.x, self.labels = blobs(96)

    def __len__(self) -> int:
        return 96

    def __getitem__(self, place):
        return {"x": self.x[place], "labels": self.labels[place]}


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def in_trainer(model: nn.Module, regime, folder, *more, evaluated=None, **options) -> None:
    """more: callbacks; evaluated: what is said of each epoch, the more the better"""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return None

    Ordered(
        Wrapped(model), transformers.TrainingArguments(**arguments_of(folder) | options),
        train_dataset=Rows(), eval_dataset=Rows(),
        compute_metrics=lambda _: {"liked": next(evaluated)},
        callbacks=[trainer_callback(regime), *more],
    ).train()  # fmt: skip


def arguments_of(folder) -> dict:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 16, "num_train_epochs": 6,
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "use_cpu": True,
        "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True,
    }  # fmt: skip


REGIMES = {
    "pruning": lambda model: gradual_pruning(model, sparsity=0.8, scope="global"),
    "movement": lambda model: movement_pruning(model, sparsity=0.8, scope="global"),
    "rate": lambda model: rate_penalty(model, bits=2.0),
    "lsq": lambda model: lsq_training(model, TASK, bits=3, ends=4, noise=0.5),
}
FORMS = {"pruning": Bitmask, "movement": Bitmask, "rate": Trellis, "lsq": Affine}
TASK = classification(calibration=blobs(96)[0], holdout=blobs(96)[0])


def check_stored(model: nn.Module, what: str, folder) -> None:
    """All that is left is for use, and goes into a file."""
    assert all(isinstance(site.form, FORMS[what]) for site in walk(model))
    assert not any(form.training_only for _, form in held(model))
    assert all(isinstance(grid, Grid) for _, _, _, grid in grids(model))
    save(model, folder / "model.tersor")
    assert torch.equal(answers(load(folder / "model.tersor", into=net())), answers(model))


@pytest.mark.parametrize("what", REGIMES)
@pytest.mark.parametrize("loop", ["lightning", "trainer"])
def test_it_is_the_same_in_every_loop(what, loop, tmp_path):
    mine, other = net(), net()
    by_hand(mine, REGIMES[what](mine))
    regime = REGIMES[what](other)
    if loop == "lightning":
        in_lightning(other, regime)
    else:
        in_trainer(other, regime, tmp_path)
    for one, two in zip(walk(mine), walk(other), strict=True):
        assert isinstance(two.form, FORMS[what])
        assert torch.allclose(one.weight, two.weight, atol=1e-5)


@pytest.mark.parametrize("what", REGIMES)
def test_what_is_stored_is_what_was_trained(what, tmp_path):
    model = net()
    trained = by_hand(model, REGIMES[what](model))
    assert torch.equal(answers(model), trained)
    assert not torch.equal(trained, answers(net()))
    check_stored(model, what, tmp_path)


def zeros(model: nn.Module) -> int:
    return sum(int((site.weight == 0).sum()) for site in walk(model))


@pytest.mark.parametrize("what", ["pruning", "movement"])
def test_exactly_as_many_weights_are_gone(what):
    model = net()
    by_hand(model, REGIMES[what](model))
    assert zeros(model) == round(0.8 * 160)


def test_accumulated_gradients_are_one_step():
    model = net()
    regime = gradual_pruning(model, sparsity=0.5)
    steps = []
    regime.gradients = lambda step: steps.append(step)
    in_lightning(model, regime, accumulate_grad_batches=2)
    assert steps == list(range(18))


def test_what_cannot_work_is_refused():
    with pytest.raises(OptionError, match="without regimes"):
        Beside([])
    model = net()
    beside = Beside([gradual_pruning(model)])
    assert isinstance(walk(model)[0].form, SoftMask)
    with pytest.raises(OptionError, match="takes -1 steps"):
        beside.begin(model, -1)


@pytest.mark.parametrize("loop", ["hand", "trainer"])
def test_a_teacher_teaches_in_other_loops(loop, tmp_path):
    torch.manual_seed(1)
    original = nn.Linear(2, 3)
    teacher = Teacher(original, TASK, temperature=2.0)
    student, x = net(), blobs(96)[0]
    lesson = Lesson(x, answer=original(x).detach())
    before = float(teacher.loss(student(x), lesson).detach())
    if loop == "trainer":
        taught_in_trainer(student, teacher, tmp_path)
    else:
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(36):
            optimizer.zero_grad()
            teacher.loss(student(x), lesson).backward()
            optimizer.step()
    assert teacher.loss(student(x), lesson) < 0.2 * before


def taught_in_trainer(student: nn.Module, teacher: Teacher, folder) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Distilling(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            outputs = model(**inputs)
            lesson = Lesson(inputs["x"], answer=teacher.original(inputs["x"]).detach())
            loss = teacher.loss(outputs["logits"], lesson)
            return (loss, outputs) if return_outputs else loss

    arguments = transformers.TrainingArguments(**arguments_of(folder))
    Distilling(Wrapped(student), arguments, train_dataset=Rows()).train()
