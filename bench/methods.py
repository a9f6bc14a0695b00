"""What each technique costs: divergence, accuracy and bytes of the written file on real networks.

Takes about a quarter of an hour on two cores, and fills the tables of the cards in docs/methods.
With --cards it only fills them again, from bench/results/methods.json.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, record
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import zoo
from tersor.codec import save
from tersor.methods import run
from tersor.surgery import decoded
from tersor.task import Task, classification

Steps = list[dict[str, Any]]
NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": zoo.resnet20,
    "resnet56": zoo.resnet56,
    "resnet8": zoo.resnet8,
    "mobilenet_v1": zoo.mobilenet_v1,
    "silero_vad": zoo.silero_vad,
    "stories260k": zoo.stories260k,
}
CORRECT = {"method": "recover.batchnorm", "options": {}}
RECIPES: dict[str, Steps] = {
    **{
        f"rtn {b} bits": [{"method": "quantize.rtn", "options": {"bits": b}}]
        for b in (8, 6, 5, 4, 3)
    },
    "rtn 4 bits, group 64": [{"method": "quantize.rtn", "options": {"bits": 4, "group_size": 64}}],
    "rtn 4 bits, per tensor": [
        {"method": "quantize.rtn", "options": {"bits": 4, "per_tensor": True}}
    ],
    **{
        f"cast {name}": [{"method": "quantize.cast", "options": {"format": name}}]
        for name in ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2")
    },
    "fp4 nvfp4": [{"method": "quantize.fp4", "options": {}}],
    "fp4 nvfp4, six": [{"method": "quantize.fp4", "options": {"four_over_six": False}}],
    "fp4 mxfp4": [{"method": "quantize.fp4", "options": {"format": "mxfp4"}}],
    "hqq 4 bits": [{"method": "quantize.hqq", "options": {}}],
    **{
        f"hqq {b} bits, group 32{', fitted' if fit else ''}": [
            {
                "method": "quantize.hqq",
                "options": {"bits": b, "group_size": 32, "fit_scale": fit},
            }
        ]
        for b in (4, 3)
        for fit in (False, True)
    },
    "ternary": [{"method": "quantize.ternary", "options": {}}],
    "ternary, group 32": [{"method": "quantize.ternary", "options": {"group_size": 32}}],
    "ternary, absmean": [{"method": "quantize.ternary", "options": {"rule": "absmean"}}],
    "binary": [{"method": "quantize.binary", "options": {}}],
    "binary, 2 planes": [{"method": "quantize.binary", "options": {"planes": 2}}],
    **{
        f"binary, {p} planes, group 32": [
            {"method": "quantize.binary", "options": {"planes": p, "group_size": 32}}
        ]
        for p in (2, 3)
    },
    **{
        f"kmeans {k} values, {start}": [
            {"method": "share.kmeans", "options": {"values": k, "start": start, "samples": 0}}
        ]
        for k in (64, 16, 8)
        for start in ("linear", "density")
    },
    **{
        f"magnitude {s}, {scope}": [
            {"method": "prune.magnitude", "options": {"sparsity": s, "scope": scope}}
        ]
        for s in (0.2, 0.3, 0.5, 0.7)
        for scope in ("layer", "global")
    },
    "magnitude 0.3, rtn 6 bits": [
        {"method": "prune.magnitude", "options": {"sparsity": 0.3}},
        {"method": "quantize.rtn", "options": {"bits": 6}},
    ],
}
CARDS = Path(__file__).parents[1] / "docs" / "methods"
# A card names its rows in a comment; the table follows it and ends at an empty line.
TABLE = re.compile(r"(<!-- bench/methods.py: (.*?) -->\n\n).*?\n\n", re.DOTALL)
TITLES = {
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "resnet8": "ResNet-8",
    "mobilenet_v1": "MobileNetV1-0.25",
    "silero_vad": "Silero VAD",
    "stories260k": "stories260K",
}
CORRECTED = ("rtn 4 bits", "rtn 3 bits", "kmeans 8 values, linear", "magnitude 0.5, layer")


@dataclass(frozen=True)
class Case:
    """A network with what is needed to judge copies of it."""

    net: nn.Module
    answer: Callable[[nn.Module], Tensor]
    truth: Tensor | None
    task: Task | None


def case(name: str) -> Case:
    """Test inputs for a network; a task with 512 calibration images where it has batch norms."""
    net = NETS[name]()
    if name == "stories260k":
        stories = zoo.story_ids(40)
        return Case(net, lambda m: torch.cat([m(ids[None])[0] for ids in stories]), None, None)
    if name == "silero_vad":
        return Case(net, speech, None, None)
    if name == "mobilenet_v1":
        images, truth = zoo.imagenet(1000, 128)
        calibration, holdout, images, truth = (
            images[:256],
            images[256:384],
            images[384:],
            truth[384:],
        )
    else:
        (images, truth), (train, _) = zoo.cifar10("test"), zoo.cifar10("train")
        calibration, holdout = train[:512], train[512:1024]
    task = classification(calibration=calibration, holdout=holdout)
    return Case(net, lambda m: torch.cat([m(x) for x in images.split(128)]), truth, task)


def speech(net: nn.Module) -> Tensor:
    """Logits of silence and speech for every frame of the recording, the state passed along."""
    frames, _ = zoo.speech_frames()
    h = c = torch.zeros(1, 128)
    found = []
    for frame in frames:
        probability, h, c = net(frame[None], h, c)
        found.append(probability)
    speaks = torch.cat(found).clamp(1e-6, 1 - 1e-6)
    return torch.stack(((1 - speaks).log(), speaks.log()), 1)


def judged(case: Case, reference: Tensor, steps: Steps) -> dict[str, Any]:
    """Figures of one recipe, or the reason why it does not apply."""
    start = time.perf_counter()
    try:
        model = run(case.net, steps, case.task)
    except ValueError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - start
    with decoded(model):
        found = case.answer(model)
    apart = reference.log_softmax(-1) - found.log_softmax(-1)
    figures = {
        "divergence": round((reference.softmax(-1) * apart).sum(-1).mean().item(), 5),
        "disagreement_percent": round(100 * _share(found.argmax(-1) != reference.argmax(-1)), 2),
        "bytes": written(model),
        "seconds": round(seconds, 2),
    }
    if case.truth is not None:
        figures["accuracy"] = round(100 * _share(found.argmax(-1) == case.truth), 2)
    outcome = model.recipe.steps[-1].outcome
    return figures | ({"outcome": outcome} if outcome else {})


def written(model: nn.Module) -> int:
    """Bytes of the file, without the graph."""
    with tempfile.TemporaryDirectory() as folder:
        return save(model, Path(folder, "model.tersor"), graph=False).stat().st_size


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


def fill_cards() -> None:
    """Writes the tables of the cards: divergence, and bytes as a share of the original's."""
    figures = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))["figures"]
    for card in sorted(CARDS.glob("*.md")):
        page = card.read_text(encoding="utf-8")
        page = TABLE.sub(
            lambda found: found[1] + _table(found[2].split("; "), figures) + "\n", page
        )
        card.write_text(page, encoding="utf-8")


def _table(labels: list[str], figures: dict[str, Any]) -> str:
    lines = [["recipe", *TITLES.values()], ["---"] * (1 + len(TITLES))]
    lines += [[label, *(_cell(figures[net], label) for net in TITLES)] for label in labels]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(rows: dict[str, Any], label: str) -> str:
    row = rows.get(label)
    if row is None:
        return "no batch norm"
    if "refused" in row:
        return "refused"
    return f"{row['divergence']:.2g}, {100 * row['bytes'] / rows['original']['bytes']:.1f} %"


@torch.no_grad()
def main() -> None:
    """Measures every recipe on every network and writes bench/results/methods.json."""
    if sys.argv[1:] == ["--cards"]:
        fill_cards()
        return
    torch.set_num_threads(2)
    figures: dict[str, Any] = {}
    for name in NETS:
        subject = case(name)
        reference = subject.answer(subject.net)
        rows: dict[str, Any] = {"original": {"bytes": written(subject.net)}}
        if subject.truth is not None:
            rows["original"]["accuracy"] = round(
                100 * _share(reference.argmax(-1) == subject.truth), 2
            )
        for label, steps in RECIPES.items():
            rows[label] = judged(subject, reference, steps)
            if subject.task is not None and label in CORRECTED:
                corrected = [*steps, CORRECT]
                rows[f"{label} + batchnorm"] = judged(subject, reference, corrected)
        figures[name] = rows
        print(name, *(f"{label}: {row}" for label, row in rows.items()), sep="\n  ", flush=True)
    record("methods", figures, packages=("numpy", "zstandard"))
    fill_cards()


if __name__ == "__main__":
    main()
