"""Headers changed at random, with right checksums: loaded as they say, or a FileError."""

import random
from contextlib import suppress

import pytest
import torch
from torch import nn

from attacks.forge import Pieces
from tersor.codec import load, save
from tersor.errors import FileError
from tersor.forms import Affine, Bitmask, Codebook, NofM, ProductCodebook
from tersor.surgery import hold

VALUES = [None, True, -1, 0, 1, 2, 3, 8, 2**31, 2**63, 0.5, 1e300, "", "x", "0.weight", "float16"]
VALUES += ["codes", "nofm", [], [0], [4, 4], [[]], {}, {"bits": 4}, "codebook", "int8", "float64"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Every kind of part, and forms inside forms."""
    torch.manual_seed(1)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).eval()
    sparse = torch.randn(8, 8) * torch.tensor([1.0, 0.0, 0.0, 1.0] * 2)
    codes = Affine.encode(sparse, bits=4)
    hold(net[0], "weight", hold(codes, "codes", Bitmask.encode(codes.codes)))
    hold(net[1], "weight", NofM.encode(sparse, n=2, m=4))
    hold(net[2], "weight", Codebook.encode(sparse, torch.linspace(-1, 1, 7)))
    hold(net[3], "weight", Affine.encode(sparse, bits=2, group_size=3, symmetric=False))
    codes = (torch.arange(24) % 5).reshape(8, 3).to(torch.uint8)
    table = torch.rand(5, 3)
    product = ProductCodebook(codes, table, axis=0, shape=(8, 8), dtype=torch.float32)
    hold(net[4], "weight", product)
    plain, scale = Codebook.encode(sparse, torch.linspace(-1, 1, 7)), torch.ones(8, 1).bfloat16()
    scaled = Codebook(plain.codes, plain.values, scale, bits=3, dtype=torch.float32, axis=0)
    hold(net[5], "weight", scaled)
    return save(net, tmp_path_factory.mktemp("file") / "net.tersor", example=torch.rand(2, 8))


def places(value, path=()):
    yield path
    if isinstance(value, list | dict):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(part, (*path, key))


def mutate(header, choose):
    """Replaces, removes, repeats or swaps one value somewhere below the top."""
    *above, last = choose.choice([p for p in places(header) if p])
    for key in above:
        header = header[key]
    action = choose.randrange(4)
    if action == 0 or (action > 1 and not isinstance(header, list)):
        header[last] = choose.choice(VALUES)
    elif action == 1:
        del header[last]
    elif action == 2:
        header.insert(last, header[last])
    else:
        other = choose.randrange(len(header))
        header[last], header[other] = header[other], header[last]


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_header_loads_whole_or_is_refused(path, seed):
    choose, refused = random.Random(seed), 0
    original = Pieces.of(path)
    for _ in range(150):
        pieces = original.copy()
        for _ in range(choose.choice([1, 1, 1, 3])):
            mutate(pieces.header, choose)
        forged = pieces.write(path.with_name(f"forged{seed}.tersor"))
        try:
            model = load(forged)
        except FileError:
            refused += 1
        else:
            # A weight of another type is a fair weight; that it cannot be multiplied shows later.
            with suppress(RuntimeError):
                assert model(torch.rand(2, 8)).shape == (2, 8)
    assert refused > 90
