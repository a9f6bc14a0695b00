"""The headline proofs: real pretrained networks through compress, figures from the written file.

    python bench/proofs.py                     all of them (about half an hour on two cores)
    python bench/proofs.py resnet20 minilm     some, merged into bench/results/proofs.json
    python bench/proofs.py --table             none: the table of README.md from that file

Each proof runs in a process of its own, so that its peak memory is its own. A second process, in
which no model code can be imported, then loads the file and must give the same outputs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _record import RESULTS, record

HERE = Path(__file__).parent
TITLES = {
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
    "minilm": "all-MiniLM-L6-v2, STS-B",
    "stories": "stories260K, TinyStories",
    "mobilenet": "MobileNetV1 0.25, ImageNet",
    "resnet8": "ResNet-8, CIFAR-10",
    "silero": "Silero VAD (LSTM), speech",
}
NAMES = tuple(TITLES)


def main() -> int:
    """Runs the chosen proofs and records them; returns 1 if a promise does not hold."""
    parser = argparse.ArgumentParser(description="Run the headline proofs.")
    parser.add_argument("names", nargs="*", metavar="proof", help=f"among {', '.join(NAMES)}")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--table", action="store_true", help="print the recorded figures")
    options = parser.parse_args()
    if options.table:
        print(table(_earlier()))
        return 0
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no proof is named {sorted(unknown)}; there are {', '.join(NAMES)}")
    figures, failed = _earlier(), []
    for name in options.names or NAMES:
        print(f"== {name}", flush=True)
        found = prove(name, options.threads)
        print(json.dumps(found, indent=2), flush=True)
        figures[name] = found
        failed += [f"{name}: {promise}" for promise, kept in found["holds"].items() if not kept]
        ordered = {known: figures[known] for known in NAMES if known in figures}
        record("proofs", ordered, packages=("transformers", "onnxruntime", "zstandard"))
    for promise in failed:
        print(f"does not hold: {promise}")
    return 1 if failed else 0


def prove(name: str, threads: int) -> dict:
    """One proof in a process of its own, then its file in another that knows no model code."""
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory() as folder:
        for script in ("_proof.py", "_reload.py"):
            command = [sys.executable, str(HERE / script), name, folder]
            done = subprocess.run(command, env=environment, check=False)
            if done.returncode:
                return {"holds": {f"{script} finishes": False}}
        found = json.loads(Path(folder, "proof.json").read_text(encoding="utf-8"))
        found["reload"] = json.loads(Path(folder, "reload.json").read_text(encoding="utf-8"))
    found["holds"]["reloads without model code, outputs equal to 1e-6 relative"] = (
        found["reload"]["largest_relative_difference"] <= 1e-6
    )
    return {"command": f"python bench/proofs.py {name}", **found}


def table(figures: dict) -> str:
    """What was recorded, as Markdown."""
    lines = [
        "| network | budget | file | of the original | quality | |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        if "metrics" not in figures.get(name, {}):
            continue
        found = figures[name]
        metric, value = next(iter(found["metrics"].items()))
        digits = {"perplexity": 3, "mae": 4}.get(metric, 2)
        quality = f"{metric} {value['before']:.{digits}f} → {value['after']:.{digits}f}"
        same = f"{100 * found['disagreement']:.1f} % decided otherwise" if "flips" in found else ""
        if "cosine" in found:
            same = f"cosine {found['cosine']:.4f}"
        size, ratio = f"{found['bytes'] / 1e3:,.0f} kB", f"{100 * found['ratio']:.1f} %"
        lines.append(f"| {title} | `{found['budget']}` | {size} | {ratio} | {quality} | {same} |")
    return "\n".join(lines)


def _earlier() -> dict:
    path = RESULTS / "proofs.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
