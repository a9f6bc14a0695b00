"""ResNet-20 on CIFAR-10: 15 % of the size, at most half a point of accuracy lost.

    python examples/cifar10.py

The command line does the same, and more, with `--data examples/cifar10.py:task`:

    tersor compress examples/zoo.py:resnet20 --data examples/cifar10.py:task --budget size=0.15x
"""

import tersor
import zoo
from tersor.report import terminal
from tersor.task import classification

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def task(calibration: int = 512) -> tersor.Task:
    """Judged on the 1,017 test images; training images, unlabelled, guide the choice of forms."""
    images, _ = zoo.cifar10("train")
    return classification(
        test=zoo.cifar10("test"),
        calibration=images[:calibration],
        holdout=images[calibration : calibration + 256],
        classes=CLASSES,
    )


def main() -> None:
    """Compresses the network, shows what changed, and runs the file without the network's code."""
    result = tersor.compress(zoo.resnet20(), task(), "size=0.15x, drop=0.5", run="runs/cifar10")
    terminal(result.report)

    images, _ = zoo.cifar10("test")
    answers = tersor.load(result.path)(images[:8]).argmax(1)
    print(f"{result.path} sees:", ", ".join(CLASSES[answer] for answer in answers))


if __name__ == "__main__":
    main()
