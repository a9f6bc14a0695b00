"""Federated averaging on MNIST: accuracy and bytes, with small updates, hidden sums and privacy.

    python bench/federated.py                 all (about ten minutes on two idle cores)
    python bench/federated.py float32 packed  some, merged into bench/results/federated.json
    python bench/federated.py --table         none: the table of the docs from that file

LeNet-300-100, 8 clients whose labels are shared out by Dirichlet(0.5), all asked in each of 20
rounds, of which two never answer. Every row has the same clients, seeds, rounds and drop-outs.
`hidden` takes the extra `federated`.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from _mnist import images as read
from _record import RESULTS, record
from torch import nn

from tersor.federated import (
    Hidden,
    Local,
    Packing,
    Plain,
    PrivateLocal,
    Secure,
    Server,
    Simulation,
    by_dirichlet,
    clients_of,
    federate,
)
from tersor.task import Task, classification

CLIENTS, LOST, ROUNDS = 8, 2, 20
FLOAT = 4


@dataclass(frozen=True)
class Row:
    """How clients and server are set up."""

    trainer: Local | PrivateLocal = field(default_factory=lambda: Local(rate=0.1))
    up: Packing | None = None
    down: Packing | None = None
    secure: Secure | None = None


DOWN = Packing(bits=3, keep=0.25)
ROWS: dict[str, Row] = {
    "float32": Row(),
    "packed": Row(up=Packing(bits=2), down=DOWN),
    "top 5 %": Row(up=Packing(bits=2, keep=0.05), down=DOWN),
    "without feedback": Row(up=Packing(bits=2, feedback=False), down=DOWN),
    "hidden": Row(down=DOWN, secure=Secure(largest=0.25, bits=12, modulus_bits=16)),
    "private": Row(
        trainer=PrivateLocal(steps=12, rate=0.4, rows=64, clip=1.0, noise=1.1, secret=False),
        up=Packing(bits=2),
        down=DOWN,
    ),
}


def main() -> None:
    """Measures the chosen rows and records them."""
    parser = argparse.ArgumentParser(description="Federated averaging on MNIST.")
    parser.add_argument("names", nargs="*", metavar="row", help=f"among {list(ROWS)}")
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    names = [] if options.table else options.names or list(ROWS)
    tasks, test = data() if names else ([], (torch.empty(0), torch.empty(0)))
    for name in names:
        found = earlier() | {name: measured(ROWS[name], tasks, test)}
        print(name, json.dumps(found[name]), flush=True)
        record("federated", {n: found[n] for n in ROWS if n in found}, packages=("cryptography",))
    print(table(earlier()))


def data() -> tuple[list[Task], tuple[torch.Tensor, torch.Tensor]]:
    """Each client's task, and the test images."""
    splits = {}
    for name in ("train", "test"):
        pictures, digits = read(name)
        splits[name] = ((pictures.flatten(1) - 0.1307) / 0.3081, digits)
    images, labels = splits["train"]
    parts = by_dirichlet(labels, CLIENTS, alpha=0.5, generator=drawn(0))
    tasks = [classification(train=(images[p], labels[p]), batch_size=100) for p in parts]
    return tasks, splits["test"]


def measured(
    row: Row, tasks: list[Task], test: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, Any]:
    """Accuracy in percent by round, and bytes of all messages."""
    model = lenet()
    numbers = sum(p.numel() for p in model.parameters())
    server = Server(model, packing=row.down, generator=drawn(3))
    clients = clients_of(model, tasks, trainer=row.trainer, packing=row.up, generator=drawn(1))
    members: list[Any] = [Plain(client) for client in clients]
    if row.secure is not None:
        members = [Hidden(i, client, row.secure) for i, client in enumerate(clients)]
    started = time.perf_counter()
    done = federate(
        server,
        Simulation(members, unanswered),
        rounds=ROUNDS,
        protection=row.secure,
        judge=lambda: accuracy(model, *test),
        generator=drawn(2),
    )
    seconds = time.perf_counter() - started
    plain_down = sum(len(result.chosen) for result in done.rounds) * FLOAT * numbers
    plain_up = sum(len(result.counted) for result in done.rounds) * FLOAT * numbers
    found: dict[str, Any] = {
        "accuracy": done.rounds[-1].judged,
        "by_round": [result.judged for result in done.rounds],
        "bytes_up": done.bytes_up,
        "bytes_down": done.bytes_down,
        "float32_bytes": plain_up + plain_down,
        "fewer_up": round(plain_up / done.bytes_up, 1),
        "fewer": round((plain_up + plain_down) / (done.bytes_up + done.bytes_down), 1),
        "counted": sum(len(result.counted) for result in done.rounds),
        "refused": sum(len(result.refused) for result in done.rounds),
        "seconds": round(seconds, 1),
    }
    if isinstance(row.trainer, PrivateLocal):
        # Who has the fewest samples shows the most of each.
        least = min(client.samples for client in clients)
        found |= {"epsilon": round(row.trainer.epsilon(least, ROUNDS), 3), "delta": 1e-5}
    return found


def unanswered(round_: int, client: int, step: str, message: bytes) -> bytes | None:
    """Two clients of each round die while they train, the same in every row."""
    lost = torch.randperm(CLIENTS, generator=drawn(round_))[:LOST].tolist()
    return None if step in ("update", "masked") and client in lost else message


def lenet() -> nn.Module:
    """LeNet-300-100, the same start each time."""
    torch.manual_seed(0)
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return nn.Sequential(*layers)


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent."""
    with torch.no_grad():
        return round(100 * float((model(images).argmax(1) == labels).double().mean()), 2)


def drawn(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def earlier() -> dict[str, Any]:
    """What is recorded."""
    path = RESULTS / "federated.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


def table(figures: dict[str, Any]) -> str:
    """What was recorded, as Markdown."""
    lines = [
        "| | accuracy | bytes up | bytes down | fewer than float32 | epsilon |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        epsilon = f"{row['epsilon']:.2f}" if "epsilon" in row else ""
        lines.append(
            f"| {name} | {row['accuracy']:.2f} % | {row['bytes_up']:,} | {row['bytes_down']:,} | "
            f"{row['fewer']:g} x | {epsilon} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
