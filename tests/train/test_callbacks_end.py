"""Regimes beside other loops, where those stop early, go on, or put another state back."""

import pytest
import torch

from tersor.forms import Bitmask, NofM
from tersor.methods.own_loop import gradual_pruning, rate_penalty
from tersor.surgery import walk
from train.test_callbacks import (
    FORMS,
    REGIMES,
    answers,
    by_hand,
    check_stored,
    in_lightning,
    in_trainer,
    net,
    zeros,
)

BEST_FIRST = {
    "load_best_model_at_end": True, "metric_for_best_model": "liked", "eval_strategy": "epoch",
    "save_strategy": "epoch",
}  # fmt: skip


@pytest.mark.parametrize("what", ["pruning", "movement"])
def test_a_best_state_of_before_gets_the_masks_of_the_end(what, tmp_path):
    model = net()
    with pytest.warns(UserWarning, match="put an earlier state back, in which .* weights were"):
        in_trainer(
            model, REGIMES[what](model), tmp_path, evaluated=iter(range(100, 0, -1)), **BEST_FIRST
        )
    assert zeros(model) == round(0.8 * 160)
    check_stored(model, what, tmp_path)


def test_a_best_state_of_the_end_is_taken_without_a_word(tmp_path, recwarn):
    model = net()
    in_trainer(model, REGIMES["pruning"](model), tmp_path, evaluated=iter(range(100)), **BEST_FIRST)
    assert zeros(model) == round(0.8 * 160)
    assert not [each for each in recwarn if each.category is UserWarning]


@pytest.mark.parametrize("what", REGIMES)
def test_a_loop_that_stops_early_leaves_a_network_that_can_be_used(what, tmp_path, recwarn):
    model = net()
    trained = by_hand(model, REGIMES[what](model), stop=9)
    assert torch.equal(answers(model), trained)
    check_stored(model, what, tmp_path)
    said = [str(each.message) for each in recwarn if each.category is UserWarning]
    if what == "lsq":
        assert not said
    else:
        assert "ended after 9 of 36 steps" in said[0]
        # 1 - (1 - 9 / 22) ** 3 of 0.8 of 160 weights are gone: 102.
        asked = "bits=2.0" if what == "rate" else "sparsity=0.8"
        reached = "a weight takes" if what == "rate" else "0.637 of the weights are zero"
        assert asked in said[1]
        assert reached in said[1]


def test_early_stopping_of_both_libraries(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = net()
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    with pytest.warns(UserWarning, match="ended after 12 of 36 steps"):
        in_trainer(
            model, REGIMES["pruning"](model), tmp_path, stopping,
            evaluated=iter(range(100, 0, -1)), **BEST_FIRST,
        )  # fmt: skip
    check_stored(model, "pruning", tmp_path)

    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

    class Stopping(lightning.Callback):
        def on_train_epoch_end(self, trainer, _):
            trainer.should_stop = True

    model = net()
    with pytest.warns(UserWarning, match="ended after 6 of 36 steps"):
        in_lightning(model, REGIMES["rate"](model), 6, Stopping(), default_root_dir=tmp_path)
    check_stored(model, "rate", tmp_path)


def test_a_pattern_that_is_not_reached_is_stored_as_it_is():
    model = net()
    with pytest.warns(UserWarning, match="sparsity='2:4' was asked for"):
        trained = by_hand(model, gradual_pruning(model, sparsity="2:4"), stop=3)
    assert torch.equal(answers(model), trained)
    assert isinstance(model[2].weight_form, Bitmask)
    whole = net()
    by_hand(whole, gradual_pruning(whole, sparsity="2:4"))
    assert isinstance(whole[2].weight_form, NofM)


def test_bits_that_were_not_reached_are_told(tmp_path, recwarn):
    model = net()
    by_hand(model, rate_penalty(model, bits=0.05), epochs=1)
    (said,) = (each for each in recwarn if each.category is UserWarning)
    assert "bits=0.05 was asked for, and a weight takes" in str(said.message)
    check_stored(model, "rate", tmp_path)


@pytest.mark.parametrize("what", REGIMES)
def test_lightning_goes_on_from_its_checkpoint(what, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

    class Kill(lightning.Callback):
        def on_train_epoch_start(self, trainer, _):
            if trainer.current_epoch == 3:
                raise InterruptedError

    whole, killed, again = net(), net(), net()
    in_lightning(whole, REGIMES[what](whole))
    keeping = lightning.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    with pytest.raises(InterruptedError):
        in_lightning(killed, REGIMES[what](killed), 6, Kill(), keeping)
    in_lightning(again, REGIMES[what](again), at=tmp_path / "epoch=2.ckpt")
    for one, two in zip(walk(whole), walk(again), strict=True):
        assert isinstance(two.form, FORMS[what])
        assert torch.equal(one.weight, two.weight)
