"""Draws docs/pictures/smallest.svg from bench/results/smallest.json: bytes against behaviour.

python tools/draw_smallest.py
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from smallest import RESNETS, ROWS, bytes_at

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, LEFT, TOP = 360, 240, 64, 48
OURS, OTHERS = "#2563eb", "#6b7280"
Point = tuple[float, float]


def main() -> None:
    """Writes the picture."""
    results = json.loads((ROOT / "bench/results/smallest.json").read_text(encoding="utf-8"))
    figures = results["figures"]

    def total(names: tuple[str, ...]) -> Callable[[float], int | None]:
        def at(wanted: float) -> int | None:
            found = [bytes_at(figures[n]["points"], "max", wanted, "divergence") for n in names]
            return None if None in found else sum(filter(None, found))

        return at

    panels = [
        panel(0, "ResNet-20 + 32 + 56, CIFAR-10", "mean KL, nats", "kB", 1e3, RESNETS, total,
              (0.004, 0.16), (0.005, 0.02, 0.1), (200, 300, 500, 700)),
        panel(470, "all-MiniLM-L6-v2, STS-B", "1 - cosine", "MB", 1e6, ("minilm",), total,
              (0.006, 0.12), (0.01, 0.03, 0.1), (5, 7, 10, 14)),
    ]  # fmt: skip
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 350" role="img" '
        'aria-labelledby="title about" font-family="sans-serif" font-size="13">\n'
        '<title id="title">Bytes of a file against how far answers move</title>\n'
        '<desc id="about">Two panels, three ResNets and MiniLM. At every divergence the files of '
        "tersor are about a third smaller than the best of other tools.</desc>\n"
        '<rect width="940" height="350" fill="#ffffff"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )
    (ROOT / "docs/pictures/smallest.svg").write_text(text, encoding="utf-8")


def panel(
    x: int,
    title: str,
    below: str,
    unit: str,
    scale: float,
    names: tuple[str, ...],
    total: Callable[[tuple[str, ...]], Callable[[float], int | None]],
    span: tuple[float, float],
    ticks: tuple[float, ...],
    sizes: tuple[int, ...],
) -> str:
    """One pair of axes, both logarithmic. span: of the divergence"""
    low, high = sizes[0] * scale * 0.8, sizes[-1] * scale * 1.15

    def place(divergence: float, size: float) -> Point:
        across = math.log(divergence / span[0]) / math.log(span[1] / span[0])
        up = math.log(size / low) / math.log(high / low)
        return x + LEFT + WIDTH * across, TOP + HEIGHT * (1 - up)

    steps = [span[0] * (span[1] / span[0]) ** (i / 60) for i in range(61)]
    sized = [(wanted, size) for wanted in steps if (size := total(names)(wanted))]
    curve = [place(*point) for point in sized]
    others = [place(w, size) for n, _, w, _, size in ROWS if n == names and size]
    parts = [f'<text x="{x + LEFT}" y="24" font-weight="bold">{title}</text>']
    for size in sizes:
        y = place(span[0], size * scale)[1]
        parts.append(f'<path d="M{x + LEFT} {y:.1f}h{WIDTH}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{x + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{size}</text>')
    for tick in ticks:
        at = place(tick, low)[0]
        parts.append(f'<path d="M{at:.1f} {TOP}v{HEIGHT}" stroke="#e5e7eb"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{tick:g}</text>'
        )
    parts.append(f'<text x="{x + LEFT - 6}" y="{TOP - 8}" text-anchor="end">{unit}</text>')
    parts.append(f'<text x="{x + LEFT + WIDTH}" y="{TOP + HEIGHT + 38}" text-anchor="end">'
                 f"{below}</text>")  # fmt: skip
    parts += [line(curve, OURS), line(others, OTHERS)]
    # Curves fall: there is room above where one begins, and below where one ends.
    (begin, above), (end, below_it) = others[0], curve[-1]
    parts.append(
        f'<text x="{begin:.1f}" y="{above - 10:.1f}" fill="{OTHERS}">best of others</text>'
    )
    parts.append(
        f'<text x="{end:.1f}" y="{below_it + 20:.1f}" text-anchor="end" fill="{OURS}">tersor</text>'
    )
    parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{OTHERS}"/>' for a, b in others]
    return "\n".join(parts)


def line(points: list[Point], colour: str) -> str:
    """A curve."""
    path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'


if __name__ == "__main__":
    main()
