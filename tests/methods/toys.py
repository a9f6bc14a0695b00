"""Teachers that know something, small students that do not, and data between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.recipe import recipe_of


def outcome(model: nn.Module) -> dict[str, object]:
    """Of the last step."""
    return recipe_of(model).steps[-1].outcome


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, seed: int = 0, vocabulary: int = 16) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def mlp(width: int, *, inputs: int = 8, classes: int = 5, seed: int = 0) -> nn.Sequential:
    """One hidden layer; the wider ones give surer answers."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))
    with torch.no_grad():
        net[2].weight *= 4
    return net.eval()


def fitted(net: nn.Module, inputs: Tensor, targets: Tensor, steps: int = 60) -> nn.Module:
    """Trained a little, the plain way."""
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval()


class Pictures(nn.Module):
    """Convolutions in three blocks; the last one halves the picture if asked to."""

    def __init__(self, width: int, *, blocks: int = 3, stride: int = 1, classes: int = 4) -> None:
        super().__init__()
        sizes = [1, *[width] * blocks]
        self.blocks = nn.ModuleList(
            PictureBlock(sizes[n], sizes[n + 1], stride if n == blocks - 1 else 1)
            for n in range(blocks)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class PictureBlock(nn.Module):
    """A convolution, its norm, and what is positive of that."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n, 1, 8, 8) noise over stripes down, stripes across, a chessboard or nothing; and which."""
    labels = tokens(n, seed=seed, vocabulary=4)
    across = (-1.0) ** torch.arange(8).expand(8, 8)
    patterns = torch.stack([across, across.T, across * across.T, torch.zeros(8, 8)])
    return 0.4 * patterns[labels][:, None] + 0.6 * normal(n, 1, 8, 8, seed=seed + 1), labels


def picture_net(width: int, *, seed: int = 0, steps: int = 0, **options: int) -> nn.Module:
    torch.manual_seed(seed)
    net = Pictures(width, **options).eval()
    return fitted(net, *pictures(128, 7), steps) if steps else net


class Reader(nn.Module):
    """A transformer that tells texts apart, its layers named as in BERT."""

    def __init__(self, width: int, *, layers: int = 2, heads: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.layer = nn.ModuleList(ReaderLayer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for layer in self.layer:
            x = layer(x, mask)
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class ReaderLayer(nn.Module):
    """Attention, then a small perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = ReaderAttention(width, heads)
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, mask))
        return x + self.dense(x).relu()


class ReaderAttention(nn.Module):
    """Every token looks at all that the mask leaves in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        keep = mask[:, None, None, :].bool()
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=keep)
        return mixed.transpose(1, 2).flatten(2)


def texts(n: int, seed: int, length: int = 6) -> dict[str, Tensor]:
    """Token ids of which some at the end are padding."""
    kept = 3 + tokens(n, seed=seed + 1, vocabulary=length - 2)
    mask = (torch.arange(length) < kept[:, None]).long()
    return {"input_ids": tokens(n, length, seed=seed) * mask, "attention_mask": mask}


def quarters(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(n,) of which quarter of the alphabet most tokens are, the first of equals."""
    counts = functional.one_hot(input_ids // 4, 4) * attention_mask[..., None]
    return counts.sum(1).argmax(1)


def reader(width: int, *, seed: int = 0, steps: int = 0, **options: int) -> nn.Module:
    """Trained, if at all, to tell of which quarter of the alphabet most tokens are."""
    torch.manual_seed(seed)
    net = Reader(width, **options).eval()
    if steps:
        given = texts(256, 7)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(net(**given), quarters(**given)).backward()
            optimizer.step()
    return net
