"""A Llama-shaped checkpoint of random weights, quantized block by block within a limit of memory.

    python bench/blockwise.py --method quantize.rtn     8 GB of bfloat16 at 4 bits, within 6 GB
    python bench/blockwise.py --layers 2 --hidden 512 --intermediate 1408 --no-record
                                                        a quick look at GPTQ

The files take 17 GB, in the folder for temporary files; TMPDIR=/mnt/large names another.

A program of its own quantizes, `tersor quantize`; this one reads its peak resident memory as the
kernel counts it (VmHWM, mapped pages included), ends it where that passes the limit, kills it once
after a third of the blocks and starts it again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import record
from safetensors.torch import save_file

GB = 10**9
METHOD, BITS, GROUP = "quantize.gptq", 4, 128


def main() -> None:
    """Makes the checkpoint, quantizes it, and removes it again."""
    parser = argparse.ArgumentParser()
    for name, default in (
        *(("layers", 36), ("hidden", 3072), ("intermediate", 8192), ("vocabulary", 64000)),
        *(("sequences", 8), ("length", 256), ("limit-gb", 6)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", default=METHOD)
    parser.add_argument("--no-record", action="store_true", help="print the figures alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(given, Path(folder))
    print(json.dumps(found, indent=2))
    if not given.no_record:
        name = f"blockwise_{given.method.partition('.')[2]}"
        record(name, found, packages=("transformers",))


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of one killed and one finished run."""
    weights, size = write_checkpoint(folder / "model", given)
    ids = np.random.default_rng(0).integers(0, given.vocabulary, given.sequences * given.length)
    np.save(folder / "tokens.npy", ids)
    # The pages just written belong to this program, and to nobody's memory.
    first = run(folder, given, stop_after=max(1, given.layers // 3))
    second = run(folder, given)
    done = second["result"]
    block = done["needs"]["block"]
    peak = max(first["peak"], second["peak"])
    seconds = first["seconds"] + second["seconds"]
    return {
        "checkpoint": {
            "parameters": weights,
            "bytes": size,
            "layers": given.layers,
            "hidden": given.hidden,
            "intermediate": given.intermediate,
            "vocabulary": given.vocabulary,
        },
        "method": [given.method, BITS, GROUP],
        "tokens": given.sequences * given.length,
        "stated": done["needs"],
        "limit_gb": given.limit_gb,
        "peak_rss_gb": round(peak / GB, 3),
        "two_blocks_and_1_gb": round((2 * block + GB) / GB, 3),
        "killed_after_blocks": first["blocks"],
        "file_bytes": done["bytes_after"],
        "bits_per_weight": round(8 * done["bytes_after"] / weights, 3),
        "seconds": round(seconds, 1),
        "seconds_per_billion": round(seconds / weights * 1e9, 1),
        "seconds_per_block": round(
            sum(b["seconds"] for b in done["blocks"]) / len(done["blocks"]), 2
        ),
        "relative_error_of_blocks": [round(b["error"], 5) for b in done["blocks"]],
        "holds": {
            "peak within the limit": peak <= given.limit_gb * GB,
            "peak within what was stated": peak <= done["needs"]["memory"],
        },
    }


def write_checkpoint(folder: Path, given: argparse.Namespace) -> tuple[int, int]:
    """A Hugging Face folder with a shard for each layer; its parameters and its bytes."""
    folder.mkdir()
    width, inner, heads = given.hidden, given.intermediate, given.hidden // 128
    groups = max(1, heads // 3)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": given.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "vocab_size": given.vocabulary,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    attention = {"q": (heads * 128, width), "k": (groups * 128, width), "v": (groups * 128, width)}
    shapes = {f"self_attn.{n}_proj": shape for n, shape in attention.items()}
    shapes |= {"self_attn.o_proj": (width, heads * 128), "mlp.gate_proj": (inner, width)}
    shapes |= {"mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    ends = {"model.embed_tokens.weight": (given.vocabulary, width)}
    ends |= {"lm_head.weight": (given.vocabulary, width), "model.norm.weight": (width,)}
    shards = [ends]
    for layer in range(given.layers):
        rows = {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shards.append(rows | {f"model.layers.{layer}.{name}.weight": (width,) for name in norms})
    placed: dict[str, str] = {}
    count = 0
    for at, wanted in enumerate(shards):
        made = torch.Generator().manual_seed(at)
        name = f"model-{at:05}-of-{len(shards):05}.safetensors"
        tensors = {key: values(shape, made) for key, shape in wanted.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
        count += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return count, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def values(shape: tuple[int, ...], made: torch.Generator) -> torch.Tensor:
    """Norms of ones, and matrices that keep the size of what they are given."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=made) / shape[1] ** 0.5).to(torch.bfloat16)


def run(folder: Path, given: argparse.Namespace, stop_after: int | None = None) -> dict[str, Any]:
    """Runs the program, to its end or until so many blocks are done."""
    command = [
        *(sys.executable, "-m", "tersor", "quantize", str(folder / "model")),
        *(str(folder / "model.tersor"), "--data", str(folder / "tokens.npy")),
        *("--sequences", str(given.sequences), "--length", str(given.length)),
        *("--method", given.method, "--option", f"bits={BITS}", "--option", f"group_size={GROUP}"),
        *("--memory-gb", str(given.limit_gb), "--json"),
    ]
    started, peak, blocks = time.monotonic(), 0, 0
    with (folder / "result.json").open("wb") as out, subprocess.Popen(command, stdout=out) as child:
        while child.poll() is None:
            peak = max(peak, peak_of(child.pid))
            if peak > given.limit_gb * GB:
                child.kill()
                raise SystemExit(f"ended at {peak / GB:.2f} GB, above {given.limit_gb} GB")
            blocks = len(list((folder / "model.tersor.work").glob("block-*")))
            if stop_after is not None and blocks >= stop_after:
                time.sleep(1)
                os.kill(child.pid, signal.SIGKILL)
                break
            time.sleep(0.05)
    found = {"seconds": time.monotonic() - started, "peak": peak, "blocks": blocks}
    if stop_after is None:
        if child.returncode:
            raise SystemExit(f"tersor quantize ended with {child.returncode}")
        found["result"] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


def peak_of(process: int) -> int:
    """Most bytes that a process has had in memory so far."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    main()
