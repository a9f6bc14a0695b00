"""Silero VAD, a recurrent speech detector: a quarter of the size, the same decisions.

python examples/speech.py
"""

import torch
from torch import Tensor, nn

import tersor
import zoo
from tersor.task import regression


def listen(model: nn.Module) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Runs over the recording: what each frame met (samples, state) and the answers."""
    frames, _ = zoo.speech_frames()
    h = c = torch.zeros(1, 128)
    states, answers = [], []
    with torch.inference_mode(), tersor.decoded(model):
        for frame in frames:
            states.append((h, c))
            probability, h, c = model(frame[None], h, c)
            answers.append(probability)
    met = tuple(torch.cat(state).clone() for state in zip(*states, strict=True))
    return (frames, *met), torch.cat(answers).clone()


def task() -> tersor.Task:
    """The original's answers are the targets; every second frame tests, the others guide."""
    inputs, answers = listen(zoo.silero_vad())
    return regression(
        test=(tuple(part[::2] for part in inputs), answers[::2]),
        calibration=tuple(part[1::4] for part in inputs),
        holdout=tuple(part[3::4] for part in inputs),
        metrics=["mae"],
    )


def main() -> None:
    """Compresses the network, then listens to the whole recording with the file alone."""
    result = tersor.compress(zoo.silero_vad(), task(), "size=0.25x, drop=0.01", run="runs/speech")
    print(f"{result.path}: {result.path.stat().st_size:,} bytes")
    _, before = listen(zoo.silero_vad())
    _, after = listen(tersor.load(result.path))
    same = ((before > 0.5) == (after > 0.5)).double().mean()
    print(f"probability of speech moved by {(after - before).abs().mean():.4f} on average")
    print(f"{100 * same:.2f} % of {len(before):,} frames decided alike")


if __name__ == "__main__":
    main()
