"""How long `import tersor` takes beside `import torch`: fresh processes, taken in turn."""

import os
import statistics
import subprocess
import sys

from _record import record

ROUNDS = 15


def seconds(statement: str) -> float:
    """Time of one import statement in a fresh interpreter, its start not counted."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    """Measures what tersor adds to torch and writes bench/results/import_time.json."""
    statements = {
        "torch": "import torch",
        "torch_and_tersor": "import torch, tersor",
        "torch_and_every_public_name": "import torch; from tersor import *",
    }
    for statement in statements.values():
        seconds(statement)
    taken: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(ROUNDS):
        for name, statement in statements.items():
            taken[name].append(seconds(statement))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    differences = {
        name: statistics.median(x - y for x, y in zip(taken[name], taken["torch"], strict=True))
        for name in statements
        if name != "torch"
    }
    figures = {
        "rounds": ROUNDS,
        "median_s": {name: round(value, 4) for name, value in medians.items()},
        "over_torch_s": {name: round(value, 4) for name, value in differences.items()},
        "over_torch_ratio": {
            name: round(medians[name] / medians["torch"], 4) for name in differences
        },
        "import_tersor_adds_less_than_0.1_s": differences["torch_and_tersor"] < 0.1,
    }
    print(record("import_time", figures).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
