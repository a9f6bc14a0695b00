"""Small networks, one for each way in which layers keep their weights."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight is (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(8, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    """The output layer uses the embedding's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.inner = nn.Linear(8, 8)
        self.output = nn.Linear(8, 16, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.inner(self.embedding(ids)).relu())


def sequence() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(16, (3, 5), generator=torch.Generator().manual_seed(0))


def image() -> Tensor:
    return torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 2, 1)
    )


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))


def old_weight_normed() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 4))


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), sequence),
    "conv": (convolutions, image),
    "lstm": (lambda: Recurrent(nn.LSTM), sequence),
    "gru": (lambda: Recurrent(nn.GRU), sequence),
    "attention": (Attention, sequence),
    "tied": (Tied, tokens),
    "conv1d of gpt-2": (lambda: nn.Sequential(Conv1D(6, 8), nn.ReLU(), Conv1D(4, 6)), sequence),
    "parametrized": (parametrized, sequence),
    "weight norm": (weight_normed, sequence),
    "old weight norm": (old_weight_normed, sequence),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """The network in evaluation mode, the same each time, and an input."""
    torch.manual_seed(0)
    net, inputs = NETS[name]
    return net().eval(), inputs()
