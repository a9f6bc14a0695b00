"""What a .tersor file is made of, and what other ways to code the same codes would take."""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zstandard
from _record import record
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import zoo
from tersor.codec import load, read_header, save
from tersor.codec.pack import Coding, encode
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk

EXAMPLES = {
    "resnet20": torch.rand(2, 3, 32, 32),
    "stories260k": torch.randint(0, 512, (2, 9)),
    "silero_vad": (torch.rand(2, 576), torch.rand(2, 128), torch.rand(2, 128)),
    "mobilenet_v1": torch.rand(2, 3, 128, 128),
}


def split(net: nn.Module, example: object) -> dict[str, float]:
    """Bytes of a file by what they hold, and seconds to write and read it."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = save(net, Path(folder, "net.tersor"), example=example)
        written = time.perf_counter()
        load(path)
        read = time.perf_counter()
        header = read_header(path)
    kinds = {"codes": 0, "scales": 0, "others": 0}
    for chunk in header.chunks:
        narrow = {torch.int8: "codes", torch.uint8: "codes", torch.bfloat16: "scales"}
        kinds[narrow.get(chunk.coding.dtype, "others")] += chunk.stored.size
    rest = header.file_bytes - sum(kinds.values())
    seconds = {"save_s": round(written - start, 2), "load_s": round(read - written, 2)}
    return {"file": header.file_bytes, **kinds, "header_and_graph": rest, **seconds}


def alternatives(net: nn.Module, bits: int) -> dict[str, int]:
    """Bytes of all codes of `net` coded as in the file, and in ways that the file does not use."""
    layers = [site.form.codes for site in walk(net)]
    coding = Coding(torch.int8, bits)

    def coded(*tensors: torch.Tensor) -> int:
        return sum(map(len, encode(tensors, coding)))

    codes = torch.cat([layer.flatten() for layer in layers]).numpy().astype(np.int16)
    codes = (codes + 2 ** (bits - 1)).astype(np.uint8)
    share = np.bincount(codes) / codes.size
    share = share[share > 0]
    straddling = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits]
    return {
        "as_in_the_file": coded(*layers),
        "a_chunk_per_layer": sum(coded(layer) for layer in layers),
        "inputs_before_outputs": coded(*(layer.T for layer in layers)),
        "one_byte_per_code_level_19": len(_zstd(codes.tobytes())),
        "straddling_bytes_level_19": len(_zstd(np.packbits(straddling.reshape(-1)).tobytes())),
        "not_compressed": codes.size * bits // 8,
        "order_0_entropy": round(float(-(share * np.log2(share)).sum()) * codes.size / 8),
    }


def _zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(content)


def main() -> None:
    """Writes bench/results/file_bytes.json."""
    torch.set_num_threads(2)
    figures = {}
    for name, example in EXAMPLES.items():
        for bits in (4, 5, 6, 8) if name == "resnet20" else (4,):
            net = rtn(getattr(zoo, name)(), bits=bits)
            figures[f"{name}, {bits} bits"] = split(net, example)
            if name == "resnet20":
                figures[f"{name}, {bits} bits"]["codes_otherwise"] = alternatives(net, bits)
    print(record("file_bytes", figures, packages=("zstandard",)).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
