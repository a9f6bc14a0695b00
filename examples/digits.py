"""A small convolution net for scikit-learn's bundled digits, trained in seconds: works anywhere.

1,797 real 8 x 8 scans of handwritten digits; nothing is read from the network or from shared data.

    tersor compress examples/digits.py:model --data examples/digits.py:task --budget size=0.2x
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import Task
from tersor.task import classification

_HELD_BACK = 500


def scans() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) images in 0..1 and their labels; the last 500 are for testing."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    return images, torch.from_numpy(found.target).long()


def model(epochs: int = 10) -> nn.Module:
    """The network, trained from the same seed every time."""
    images, labels = scans()
    images, labels = images[:-_HELD_BACK], labels[:-_HELD_BACK]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = _untrained()
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(50):
                optimizer.zero_grad()
                functional.cross_entropy(net(images[rows]), labels[rows]).backward()
                optimizer.step()
    return net.eval()


def task() -> Task:
    """Judged on the last 500 scans; the others guide the choice of forms, without their labels."""
    images, labels = scans()
    return classification(
        test=(images[-_HELD_BACK:], labels[-_HELD_BACK:]),
        calibration=images[:500],
        holdout=images[500:-_HELD_BACK],
        classes=[str(digit) for digit in range(10)],
    )


def _untrained() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 1), *pooled)
