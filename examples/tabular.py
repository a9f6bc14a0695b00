"""A network for a table, trained here on scikit-learn's breast cancer data, then compressed.

python examples/tabular.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.task import classification

TESTED = 169


def table() -> tuple[Tensor, Tensor]:
    """(569, 30) measurements of cell nuclei and the diagnosis: 0 malignant, 1 benign."""
    from sklearn.datasets import load_breast_cancer

    found = load_breast_cancer()
    return torch.from_numpy(found.data).float(), torch.from_numpy(found.target).long()


def main() -> None:
    """Trains, compresses and shows what changed."""
    torch.manual_seed(0)
    rows, labels = table()
    # The batch norm scales the columns, so the file takes raw measurements.
    model = nn.Sequential(
        *(nn.BatchNorm1d(30), nn.Linear(30, 256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model(rows[TESTED:]), labels[TESTED:]).backward()
        optimizer.step()

    task = classification(
        test=(rows[:TESTED], labels[:TESTED]),
        train=(rows[TESTED:], labels[TESTED:]),
        classes=["malignant", "benign"],
    )
    result = tersor.compress(model.eval(), task, "size=0.1x, drop=1", run="runs/tabular")
    print(f"{result.path}: {result.path.stat().st_size:,} bytes")
    for name, change in result.report["comparison"]["metrics"].items():
        before, after = change["before"]["value"], change["after"]["value"]
        print(f"{name:18}{before:7.2f} -> {after:6.2f}")


if __name__ == "__main__":
    main()
