"""A small Llama that writes stories: a quarter of the size, its output layer tied to its embedding.

python examples/stories.py
"""

import torch

import tersor
import zoo
from tersor.surgery import decoded
from tersor.task import language_model


def task(calibration: int = 8) -> tersor.Task:
    """Judged by the perplexity of the last 150 stories; some before them guide the choice."""
    ids = zoo.story_ids(150 + 2 * calibration)
    known, test = ids[:-150], ids[-150:]
    return language_model(test=test, calibration=known[:calibration], holdout=known[calibration:])


def write(model: torch.nn.Module, opening: str, length: int = 60) -> str:
    """The likeliest continuation, one token at a time."""
    tokenizer = zoo.StoriesTokenizer()
    ids = tokenizer.encode(opening)
    with torch.inference_mode(), decoded(model):
        while len(ids) < length:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids)


def main() -> None:
    """Compresses the model and lets both versions tell a story."""
    original = zoo.stories260k()
    result = tersor.compress(original, task(), "size=0.25x", run="runs/stories")
    change = result.report["comparison"]["metrics"]["perplexity"]
    print(f"{result.path}: {result.path.stat().st_size:,} bytes")
    print(f"perplexity {change['before']['value']:.3f} -> {change['after']['value']:.3f}")
    print("before:", write(original, "Once upon a time"))
    print("after: ", write(tersor.load(result.path), "Once upon a time"))


if __name__ == "__main__":
    main()
