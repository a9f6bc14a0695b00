"""Trainings that went wrong in ways a loss does not show are stopped, with names and values."""

import pytest
import torch
from torch import nn

from tersor.errors import ModelError
from tersor.methods import run
from tersor.task import classification
from tersor.train import Labels
from tersor.train.health import Alive, Bounded
from train.test_loop import blobs, net, trained


def dead() -> nn.Sequential:
    """No input reaches its end, while the last bias goes on learning."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    return model


def test_a_student_that_gives_one_answer_to_everything_is_dead():
    x, y = blobs(256)
    task = classification(train=(x, y), holdout=x[:32], batch_size=8)
    step = {"method": "distill.logits", "options": {"epochs": 2}}
    with pytest.raises(ModelError, match="for 20 batches the network has given the same answer"):
        run(dead(), [step], task, original=net().eval())
    # A teacher that does the same is answered well.
    assert run(dead(), [step], task, original=dead()).recipe.steps[-1].outcome["kept"]


def test_one_batch_with_different_answers_is_enough():
    watch, same, wanted = Alive(), torch.zeros(4, 3), torch.arange(4)
    watch.begin(net(), 99)
    for _ in range(3):
        for _ in range(19):
            watch.look(same, wanted)
        watch.look(torch.eye(4, 3), wanted)
        watch.gradients(0)
    for _ in range(40):
        watch.look(same, torch.zeros(4))
        watch.look(same[:1], wanted[:1])
        watch.look(same, None)
    for _ in range(19):
        watch.look(same, wanted)
    watch.gradients(5)
    again = Alive()
    again.begin(net(), 99)
    again.restore(watch.state())
    again.look(same, wanted)
    with pytest.raises(ModelError, match=r"step 7 of 99: for 20 batches .* lower rate"):
        again.gradients(6)


@pytest.mark.parametrize(("factor", "said"), [(2e5, r"6e\+05"), (float("nan"), "nan")])
def test_a_scale_that_runs_away_stops_it(factor, said):
    scale = torch.tensor([1.0, -3.0])

    class Growing(Bounded):
        def gradients(self, step: int) -> None:
            if step == 13:
                scale.mul_(factor)

    regime = Growing({'the scale of "0.weight"': lambda: scale})
    with pytest.raises(
        ModelError,
        match=rf'step 20 of 48: the scale of "0.weight" is {said} and began at 3; .* clip',
    ):
        trained(net(), Labels(classification(train=blobs(), batch_size=8)), regimes=[regime])


def test_what_grows_slowly_goes_on():
    scale = torch.tensor([1e-3])

    class Growing(Bounded):
        def gradients(self, step: int) -> None:
            scale.mul_(1.1)

    lessons = Labels(classification(train=blobs(), batch_size=8))
    trained(net(), lessons, regimes=[Growing({"it": lambda: scale})])
    assert float(scale) < 10
