import gc
import time
from importlib import import_module

import pytest
import torch
from torch import nn

from tersor.errors import OptionError
from tersor.forms import Affine
from tersor.measure import latency, latency_ab, time_call, time_pair
from tersor.surgery import form_of, hold


class Clock:
    """Moves only when a call says so, so that a busy machine changes no figure."""

    def __init__(self):
        self.now = 0

    def perf_counter_ns(self):
        return self.now

    def taking(self, *milliseconds):
        """A call that takes so long, each time the next; the last for ever after."""
        left = list(milliseconds)

        def run():
            self.now += round(1e6 * (left.pop(0) if len(left) > 1 else left[0]))

        return run


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(import_module("tersor.measure.latency"), "time", found)
    return found


def test_figures_worked_by_hand(clock):
    # 1 to 5 ms: the 95th percentile lies 0.8 of the way from the fourth to the fifth.
    found = time_call(clock.taking(4, 2, 1, 3, 5), 7, threads=1, repeats=5, warmup=0)
    assert (found.minimum_ms, found.median_ms, found.p95_ms) == pytest.approx((1, 3, 4.8))
    assert (found.threads, found.batch, found.repeats) == (1, 7, 5)


def test_warm_up_calls_are_made_and_not_timed(clock):
    found = time_call(clock.taking(90, 80, 70, 2), repeats=4, warmup=3)
    assert clock.now == (240 + 4 * 2) * 1e6
    assert (found.median_ms, found.p95_ms) == (2, 2)


def test_a_real_call_takes_real_time():
    assert time_call(lambda: time.sleep(0.004), repeats=3).minimum_ms >= 4


def test_a_pair_takes_turns_and_gives_the_median_of_its_ratios(clock):
    order = []
    before, after = clock.taking(9, 6, 8, 6, 30, 6), clock.taking(9, 2, 2, 2, 3, 3)
    pair = time_pair(
        lambda: (order.append("a"), before()),
        lambda: (order.append("b"), after()),
        repeats=5,
        warmup=1,
    )
    assert "".join(order) == "ab" + "abba" * 2 + "ab"
    # Pairs 6/2, 8/2, 6/2, 30/3, 6/3: their median, not the ratio of the medians or of the means.
    assert pair.ratio == pytest.approx(3)
    assert (pair.before.median_ms, pair.after.median_ms) == pytest.approx((6, 2))
    assert 2 <= pair.low <= 3 <= pair.high <= 10


def test_the_interval_closes_around_a_ratio_without_noise(clock):
    pair = time_pair(clock.taking(6), clock.taking(4), repeats=9)
    assert (pair.low, pair.ratio, pair.high) == (1.5, 1.5, 1.5)


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
    small, wide = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4096), nn.Linear(4096, 4096))
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
        time_call(lambda: None, **options)
