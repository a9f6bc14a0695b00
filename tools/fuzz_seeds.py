"""Small files that mutants are made of: those of make_golden, and a few with what they lack."""

from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

import make_golden
from make_golden import network, values
from tersor.codec import save
from tersor.forms import (
    Affine,
    Bitmask,
    BitPlanes,
    Bitshift,
    BlockFloat,
    Codebook,
    Dense,
    NofM,
    ProductCodebook,
    Residual,
    Rotated,
    Trellis,
)
from tersor.forms.bitshift import pack
from tersor.forms.rotated import turn_both
from tersor.surgery import hold

BASES = {"changes": "max", "trained": "floats"}


@dataclass(frozen=True)
class Seed:
    """A whole file, and what one of them needs beside it.

    name: as findings call it; base: the file that its changes are counted from, or None
    """

    name: str
    content: bytes
    base: bytes | None = None


class Tied(nn.Module):
    """A weight under two names, a constant, a table of rows, attention over free sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.back = nn.Linear(4, 9, bias=False)
        self.back.weight = self.table.weight

    def forward(self, words: Tensor) -> dict[str, Tensor]:
        """words: (batch, length) int64"""
        x = self.table(words) * torch.tensor([1.0, 2.0, 3.0, 5.0])
        mixed = torch.softmax(x @ x.transpose(1, 2) / 2, -1) @ x
        return {"scores": self.back(mixed), "best": self.back(mixed).argmax(-1)}


class Types(nn.Module):
    """A buffer of each type that a file can hold."""

    def __init__(self) -> None:
        super().__init__()
        numbers = values(3, 4)
        for dtype in (torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool):
            self.register_buffer(f"{dtype}s"[6:], (numbers * 100).abs().to(dtype))
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64):
            self.register_buffer(f"{dtype}s"[6:], numbers.to(dtype))
        for dtype in (torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2):
            self.register_buffer(f"{dtype}s"[6:], numbers.to(dtype))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., 4)"""
        return x * self.float16s.float().sum() + self.int64s.sum()


def forms() -> nn.Module:
    """One layer in each form, some inside others."""
    net = network(*(nn.Linear(8, 8) for _ in range(14)))
    some = net[0].weight.detach().relu()
    pairs = net[1].weight.detach() * (torch.arange(8) % 4 < 2)
    codes = Affine.encode(some, bits=4)
    hold(net[0], "weight", hold(codes, "codes", Bitmask.encode(codes.codes)))
    hold(net[1], "weight", NofM.encode(pairs, n=2, m=4))
    hold(net[2], "weight", Codebook.encode(net[2].weight, torch.linspace(-1, 1, 7)))
    hold(net[3], "weight", Affine.encode(net[3].weight, bits=2, group_size=3, symmetric=False))
    hold(net[4], "weight", Trellis.encode(net[4].weight, step=1 / 32, states=8))
    hold(net[5], "weight", Dense.encode(net[5].weight, dtype=torch.float16))
    hold(net[6], "weight", BlockFloat.encode(net[6].weight))
    hold(net[7], "weight", BlockFloat.encode(net[7].weight, format="mxfp4"))
    hold(net[9], "weight", BitPlanes.encode(net[9].weight))
    hold(net[8], "weight", corrected(net[8].weight.detach()))
    hold(net[10], "weight", turned(net[10].weight.detach()))
    hold(net[11], "weight", Dense.encode_scaled(net[11].weight, dtype=torch.float8_e4m3fn))
    codes = (torch.arange(24) % 5).reshape(8, 3).to(torch.uint8)
    table = ProductCodebook(codes, values(5, 3), axis=0, shape=(8, 8), dtype=torch.float32)
    hold(net[12], "weight", table)
    indices = (torch.arange(64) % 4).reshape(8, 8).to(torch.uint8)
    scale = (values(8, 1).abs() + 0.1).bfloat16()
    scaled = Codebook(indices, values(4), scale, bits=2, dtype=torch.float32, axis=0)
    hold(net[13], "weight", scaled)
    return net


def turned(weight: Tensor) -> Rotated:
    """Rings of 2-bit codes, all of them random, under a rotation."""
    form = Rotated(turn_both(weight, 3), seed=3, axis=0, shape=(8, 8), dtype=torch.float32)
    codes = (values(4, 16) * 1000).round().to(torch.int32) & 3
    layout: dict[str, Any] = {"bits": 2, "state_bits": 10, "tile": (8, 2), "axis": 0}
    scale = torch.tensor([[0.5]], dtype=torch.bfloat16)
    rings = Bitshift(pack(codes, 2), scale, shape=(8, 8), dtype=torch.float32, **layout)
    return cast("Rotated", hold(form, "turned", rings))


def corrected(weight: Tensor) -> Residual:
    """3-bit codes, and factors of two kinds beside them."""
    left, right = weight[:, :2], weight[:2].bfloat16()
    form = Residual(weight, left, right, axis=0, shape=(8, 8), dtype=torch.float32)
    hold(form, "base", Affine.encode(weight, bits=3))
    return cast("Residual", hold(form, "left", Affine.encode(left, bits=8, axis=1)))


def tiny() -> nn.Module:
    """Two layers of 3-bit codes."""
    net = network(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in (net[0], net[2]):
        hold(layer, "weight", Affine.encode(layer.weight, bits=3))
    return net


def write_seeds(folder: Path) -> None:
    """Writes all of them, the same bytes wherever zstandard is the same."""
    with mock.patch("make_golden.GOLDEN", folder), redirect_stdout(StringIO()):
        make_golden.main()
    for name, net, options in _more():
        save(net, folder / f"{name}.tersor", **options)
    net = network(nn.Linear(12, 12), nn.Linear(12, 12))
    with make_golden.settings("chunks"):
        save(net, folder / "chunks-words.tersor", example=values(2, 12))


def read_seeds(folder: Path) -> list[Seed]:
    """The seeds in a folder, by name."""
    found = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.tersor"))}
    return [Seed(name, data, found.get(BASES.get(name, ""))) for name, data in found.items()]


def _more() -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """(name, network, options of `save`)"""
    for profile in ("fast", "small", "max"):
        yield f"tiny-{profile}", tiny(), {"example": values(2, 5), "profile": profile}
        yield f"forms-{profile}", forms(), {"example": values(2, 8), "profile": profile}
    yield "tied", network(Tied()), {"example": torch.tensor([[1, 2, 3], [4, 5, 8]])}
    yield "types", network(Types()), {"example": values(2, 4)}
    yield "no-graph", tiny(), {"graph": False, "metrics": {"accuracy": 91.5}}
