"""What tests of pruning by training share: a network that knows eight clusters, and its data."""

import torch
from torch import Tensor, nn

from tersor.methods import run
from tersor.task import Task, classification


def clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise around one of eight centres."""
    labels = torch.arange(n) % 8
    centres = torch.randn(8, 32, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
    return 0.6 * centres[labels] + noise, labels


def task(*, labels: bool = True, batch_size: int = 64, n: int = 512) -> Task:
    """Training data with labels or without, and others to test."""
    train = clusters(n, 1)
    data = {"train": train} if labels else {"calibration": train[0]}
    return classification(
        **data, holdout=clusters(128, 2)[0], test=clusters(512, 3), batch_size=batch_size
    )


def net(*, trained: bool = True) -> nn.Sequential:
    """Two hidden layers. trained: on the labels, to about 95 %"""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(32, 48), nn.ReLU()), *(nn.Linear(48, 48), nn.ReLU()), nn.Linear(48, 8)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(6 * trained):
        for inputs, labels in task().train(torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model.eval()


def one_shot(model: nn.Module, sparsity: float, scope: str = "layer") -> nn.Module:
    """The same share of the smallest weights gone, without training."""
    options = {"sparsity": sparsity, "scope": scope}
    return run(model, [{"method": "prune.magnitude", "options": options}])


def zeros(model: nn.Module) -> list[Tensor]:
    """Where the weights of each linear layer are zero."""
    return [layer.weight == 0 for layer in model if isinstance(layer, nn.Linear)]
