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
    """Measures both and writes bench/results/import_time.json."""
    statements = {"torch": "import torch", "tersor": "import tersor"}
    for statement in statements.values():
        seconds(statement)
    taken: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(ROUNDS):
        for name, statement in statements.items():
            taken[name].append(seconds(statement))
    torch_s, tersor_s = (statistics.median(taken[name]) for name in ("torch", "tersor"))
    extra = statistics.median(
        after - before for before, after in zip(taken["torch"], taken["tersor"], strict=True)
    )
    figures = {
        "rounds": ROUNDS,
        "import_torch_median_s": round(torch_s, 4),
        "import_tersor_median_s": round(tersor_s, 4),
        "ratio": round(tersor_s / torch_s, 4),
        "difference_median_s": round(extra, 4),
        "below_0.1_s": extra < 0.1,
    }
    print(record("import_time", figures).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
