import gc
import time

import pytest
import torch
from torch import nn

from tersor.errors import OptionError
from tersor.forms import Affine
from tersor.measure import latency, latency_ab, time_call, time_pair
from tersor.surgery import form_of, hold


def sleeper(milliseconds):
    return lambda: time.sleep(milliseconds / 1000)


def test_a_call_of_known_length_is_timed():
    found = time_call(sleeper(4), 7, threads=1, repeats=9, warmup=0)
    assert 4 <= found.minimum_ms <= found.median_ms <= found.p95_ms < 40
    assert (found.threads, found.batch, found.repeats) == (1, 7, 9)


def test_warm_up_calls_are_made_and_not_timed():
    calls = []

    def slow_at_first():
        time.sleep(0.05 if len(calls) < 3 else 0)
        calls.append(1)

    found = time_call(slow_at_first, repeats=5, warmup=3)
    assert len(calls) == 8
    assert found.p95_ms < 40


def test_a_pair_takes_turns_and_gives_the_ratio_with_its_interval():
    order = []
    pair = time_pair(
        lambda: (order.append("a"), time.sleep(0.006)),
        lambda: (order.append("b"), time.sleep(0.002)),
        repeats=12,
        warmup=1,
    )
    assert "".join(order) == "ab" + "abba" * 6
    assert 2 < pair.ratio < 3.2
    assert pair.low <= pair.ratio <= pair.high
    assert pair.before.minimum_ms >= 6
    assert 2 <= pair.after.minimum_ms < 6


def test_the_interval_narrows_around_equal_calls():
    pair = time_pair(sleeper(3), sleeper(3), repeats=40)
    assert 0.8 < pair.low <= pair.high < 1.25


def test_a_model_is_timed_decoded_and_left_as_it_was():
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout()).train()
    form = Affine.encode(net[0].weight, bits=4)
    hold(net[0], "weight", form)
    before = torch.get_num_threads()
    seen = []
    net[0].register_forward_hook(
        lambda *_: seen.append((net[1].training, form._decoded is None, torch.get_num_threads()))
    )
    found = latency(net, torch.zeros(5, 8), threads=1, repeats=3, warmup=2)
    assert seen == [(False, False, 1)] * 5
    assert (found.batch, found.threads) == (5, 1)
    assert net.training
    assert net[1].training
    assert form_of(net[0], "weight") is form
    assert form._decoded is None
    assert torch.get_num_threads() == before
    assert gc.isenabled()


def test_two_models_are_timed_in_turn():
    small, large = nn.Linear(8, 8), nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    wide = nn.Sequential(nn.Linear(8, 512), large)
    pair = latency_ab(wide, small, torch.zeros(4, 8), repeats=15)
    assert pair.ratio > 3
    plain = pair.as_json()
    assert set(plain) == {"before", "after", "ratio", "low", "high"}
    assert plain["before"]["batch"] == 4


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        time_call(lambda: 1 / 0, threads=1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, r"repeats=0, warmup=5; time at least 1 call"),
        ({"warmup": -1}, r"repeats=50, warmup=-1; time at least 1 call"),
        ({"threads": 0}, r"threads=0; at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        time_call(sleeper(0), **options)
