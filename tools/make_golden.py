"""Writes tests/golden: small files, and the values that they must give for ever.

python tools/make_golden.py

Run it only together with a change of the file version: tests/codec/test_golden.py holds readers to
the values, and writers to the bytes. Values come from a counter, not from torch, whose random
numbers may change; the content of chunks uses no zstandard, whose output may.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.codec import save, shelf
from tersor.forms import Affine, Bitmask, Codebook, Dense, NofM, Trellis
from tersor.surgery import hold

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SMALL_CHUNKS = {
    "tersor.codec.shelf.TOGETHER": 60,
    "tersor.codec.shelf.CHUNK": dict.fromkeys(shelf.CHUNK, 60),
}
ALONE = {"tersor.codec.runs._QUICK": 0}
SETTINGS = {"fast": ALONE, "trellis": ALONE, "chunks": SMALL_CHUNKS}
"""What a writer is set to, so that small files have what large ones have."""


def values(*shape: int, seed: int = 1) -> Tensor:
    """Numbers around zero, most of them small, equal on every machine."""
    found, state = [], seed
    for _ in range(int(torch.Size(shape).numel())):
        total = 0
        for _ in range(4):
            state = (state * 1103515245 + 12345) % 2**31
            total += (state >> 8) % 2**16
        found.append((total - 2**17) / 77777)
    return torch.tensor(found).reshape(shape)


def network(*layers: nn.Module) -> nn.Module:
    """The layers in a row, every parameter and float buffer set."""
    net = nn.Sequential(*layers).eval()
    for seed, (name, tensor) in enumerate(net.state_dict().items(), 7):
        if tensor.is_floating_point():
            wanted = values(*tensor.shape, seed=seed)
            tensor.copy_(wanted.abs() + 0.5 if name.endswith("running_var") else wanted)
    return net


def affine() -> nn.Module:
    """Codes of several widths, with and without zero points."""
    net = network(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
    hold(net[0], "weight", Affine.encode(net[0].weight, bits=4))
    hold(net[3], "weight", Affine.encode(net[3].weight, bits=6, group_size=12, symmetric=False))
    return net


def trellis() -> nn.Module:
    """Trellises of several states, and vectors on a grid."""
    net = network(*(nn.Linear(12, 12) for _ in range(3)))
    for layer, states in zip(net, (1, 8, 64), strict=True):
        hold(layer, "weight", Trellis.encode(layer.weight, step=1 / 32, states=states))
        hold(layer, "bias", Trellis.encode(layer.bias, step=1 / 512, axis=None))
    return net


def sparse() -> nn.Module:
    """A mask, places, a codebook, and forms inside forms."""
    net = network(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    some = net[0].weight.detach().relu()
    pairs = net[1].weight.detach() * (torch.arange(16) % 4 < 2)
    hold(net[0], "weight", Bitmask.encode(some))
    places = Affine.encode(pairs, bits=4)
    hold(net[1], "weight", hold(places, "codes", NofM.encode(places.codes, n=2, m=4)))
    hold(net[2], "weight", Codebook.encode(net[2].weight, torch.arange(-8, 8) / 8))
    codes = Affine.encode(net[3].weight.detach().relu(), bits=5)
    hold(net[3], "weight", hold(codes, "codes", Bitmask.encode(codes.codes)))
    return net


def floats() -> nn.Module:
    """Floats of several types, tensors of one value, a counter."""
    net = network(nn.Linear(24, 24), nn.BatchNorm1d(24), *(nn.Linear(24, 24) for _ in range(3)))
    hold(net[2], "weight", Dense.encode(net[2].weight, dtype=torch.bfloat16))
    hold(net[3], "weight", Dense.encode(net[3].weight, dtype=torch.float16))
    hold(net[4], "weight", Dense.encode(net[4].weight, dtype=torch.float8_e5m2))
    net[1].weight.data.fill_(1)
    net[1].num_batches_tracked.fill_(39063)
    return net


def later() -> nn.Module:
    """`affine` with a code changed, and a bias."""
    net = affine()
    net[0].weight_form.codes[1, 3] += 1
    net[1].bias.data[2] *= 1.001
    return net


def trained() -> nn.Module:
    """`floats` after a small step."""
    net = floats()
    net[0].weight.data *= 1 + 2**-18
    return net


@contextmanager
def settings(name: str) -> Iterator[None]:
    """Sets the writer as it was for a file."""
    with ExitStack() as stack:
        for place, value in SETTINGS.get(name, {}).items():
            stack.enter_context(mock.patch(place, value))
        yield


def write(name: str, net: nn.Module, example: Tensor, base: Path | None = None) -> Path:
    """A file and its values: those that forms give back, and all plain tensors."""
    with settings(name):
        path = save(
            net,
            GOLDEN / f"{name}.tersor",
            example=example,
            profile=profile_of(name),
            base=base,
        )
    state = {key: tensor.contiguous() for key, tensor in net.state_dict().items()}
    weights = {
        f"{key}.weight": layer.weight.detach()
        for key, layer in net.named_children()
        if hasattr(layer, "weight")
    }
    save_file(state | weights, path.with_suffix(".safetensors"))
    print(f"{path.name}: {path.stat().st_size} bytes")
    return path


def profile_of(name: str) -> str:
    """The profile of a file."""
    return {"sparse": "max", "chunks": "max", "floats": "fast", "trained": "fast"}.get(
        name, name if name in ("fast", "max") else "small"
    )


def main() -> None:
    """Writes all of them."""
    GOLDEN.mkdir(exist_ok=True)
    images = values(2, 3, 8, 8)
    for name in ("fast", "small", "max"):
        base = write(name, affine(), images)
    write("changes", later(), images, base)
    write("trellis", trellis(), values(2, 12))
    write("chunks", trellis(), values(2, 12))
    write("sparse", sparse(), values(2, 16))
    base = write("floats", floats(), values(2, 24))
    write("trained", trained(), values(2, 24), base)


if __name__ == "__main__":
    main()
