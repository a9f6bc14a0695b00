import subprocess
import sys

import torch
from torch import nn

import zoo
from tersor.forms import Affine
from tersor.measure import peak_memory, process_peak_rss
from tersor.surgery import walk


def test_peak_worked_by_hand():
    # Batch 2: 4 -> 100 floats (800 bytes), relu 100 (800), then 3 (24). The first layer's output is
    # gone when the last one runs, so the peak is linear and relu together: 1600 bytes.
    net = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 3))
    found = peak_memory(net, torch.zeros(2, 4))
    assert found.activations == 1600
    assert found.weights == 4 * (400 + 100 + 300 + 3)
    assert found.inputs == 32
    assert found.total == 1600 + 3212 + 32


def test_what_is_computed_in_place_or_viewed_costs_nothing():
    net = nn.Sequential(
        nn.Linear(4, 100), nn.ReLU(inplace=True), nn.Unflatten(1, (10, 10)), nn.Flatten()
    )
    assert peak_memory(net, torch.zeros(2, 4)).activations == 800


class Keeping(nn.Module):
    def forward(self, x):
        return [x + number for number in range(5)]


class Dropping(nn.Module):
    def forward(self, x):
        for number in range(5):
            x = x + number
        return x


def test_only_what_lives_at_once_counts():
    x = torch.zeros(1000)
    assert peak_memory(Keeping(), x).activations == 5 * 4000
    assert peak_memory(Dropping(), x).activations == 2 * 4000


def test_peak_grows_with_the_batch_and_repeats_exactly():
    net = zoo.CifarResNet(20)
    one, four = (peak_memory(net, torch.zeros(n, 3, 32, 32)) for n in (1, 4))
    assert four.activations == 4 * one.activations
    # The widest moment: input, normalized or block input, and the 16-channel maps of a block.
    assert 3 * 65_536 <= one.activations <= 5 * 65_536
    assert [peak_memory(net, torch.zeros(1, 3, 32, 32)) for _ in range(3)] == [one] * 3


def test_decoded_weights_are_weights_and_no_activations():
    net = zoo.CifarResNet(8)
    before = peak_memory(net, torch.zeros(1, 3, 32, 32))
    for site in walk(net):
        site.hold(Affine.encode(site.weight, bits=4, axis=site.axis))
    assert peak_memory(net, torch.zeros(1, 3, 32, 32)) == before


def test_peak_rss_is_of_this_process_and_grows():
    before = process_peak_rss()
    assert before > 50e6
    block = torch.ones(int(before) // 4 + 25_000_000)
    assert process_peak_rss() >= before + 50e6
    del block
    # A child that touches little has a peak of its own.
    code = "from tersor.measure.memory import process_peak_rss; print(process_peak_rss())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50e6 < int(child.stdout) < process_peak_rss()
