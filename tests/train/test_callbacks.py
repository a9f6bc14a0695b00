"""Regimes beside loops that are not tersor's do there what they do in tersor's own."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tersor.errors import OptionError
from tersor.forms import Bitmask, SoftMask, Trellis
from tersor.methods.own_loop import gradual_pruning, rate_penalty
from tersor.surgery import walk
from tersor.train.callbacks import Beside, lightning_callback, trainer_callback
from train.test_loop import blobs


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))


def by_hand(model: nn.Module, regime, epochs: int = 6) -> None:
    beside = Beside([regime])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    beside.begin(model, 6 * epochs)
    for _ in range(epochs):
        for x, y in zip(*(part.split(16) for part in blobs(96)), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            beside.gradients()
            optimizer.step()
            beside.after()
    beside.finish()


def in_lightning(model: nn.Module, regime, epochs: int = 6, **options) -> None:
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
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[lightning_callback(regime)], **options,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(*blobs(96)), batch_size=16))


class Rows(Dataset):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, place):
        return {"x": blobs(96)[0][place], "labels": blobs(96)[1][place]}


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def in_trainer(model: nn.Module, regime, folder, epochs: int = 6) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return None

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16, num_train_epochs=epochs,
        learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Ordered(
        Wrapped(model), arguments, train_dataset=Rows(), callbacks=[trainer_callback(regime)]
    ).train()


REGIMES = {
    "pruning": lambda model: gradual_pruning(model, sparsity=0.8, scope="global"),
    "rate": lambda model: rate_penalty(model, bits=2.0),
}


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
        assert isinstance(two.form, Bitmask if what == "pruning" else Trellis)
        assert torch.allclose(one.weight, two.weight, atol=1e-5)


def test_exactly_as_many_weights_are_gone():
    model = net()
    by_hand(model, gradual_pruning(model, sparsity=0.8, scope="global"))
    weights = torch.cat([site.weight.flatten() for site in walk(model)])
    assert int((weights == 0).sum()) == round(0.8 * len(weights))


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
    beside.begin(model, 10)
    with pytest.raises(OptionError, match="ended after 0 steps"):
        beside.finish()
