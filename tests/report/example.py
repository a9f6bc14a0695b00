"""A report as a run of ResNet-20 on CIFAR-10 leaves it; figures are made up but hang together."""

import math

import numpy as np

from tersor.report.image import address, png


def example_report() -> dict:
    rng = np.random.default_rng(7)
    names = [
        "conv1",
        *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)),
    ]
    layers, sensitivity = [], []
    for i, name in enumerate([*names, "linear"]):
        width = 16 if i < 7 else 32 if i < 13 else 64
        shape = (
            [width, width, 3, 3]
            if name not in ("conv1", "linear")
            else [16, 3, 3, 3]
            if i == 0
            else [10, 64]
        )
        parameters = math.prod(shape)
        bits = 8 if i in (0, 19) else int(rng.integers(3, 6))
        divergence = float(0.0004 * 4 ** (5 - min(bits, 5)) * rng.uniform(0.3, 2))
        layers.append(
            {
                "name": f"{name}.weight",
                "kind": "Linear" if name == "linear" else "Conv2d",
                "shape": shape,
                "parameters": parameters,
                "bytes_before": 4 * parameters,
                "bytes_after": int(parameters * bits / 8 * 0.93) + 2 * shape[0],
                "option": f"int{bits}",
                "divergence": divergence,
            }
        )
        sensitivity += [
            {
                "layer": f"{name}.weight",
                "option": f"int{b}",
                "divergence": float(2e-6 * 4 ** (8 - b) * rng.uniform(0.3, 3)),
                "bytes": int(parameters * b / 8 * 0.93) + 2 * shape[0],
            }
            for b in (8, 6, 5, 4, 3, 2)
        ]
    after = sum(layer["bytes_after"] for layer in layers) + 9_000
    points = [
        {
            "bytes": int(after * f),
            "divergence": d,
            "metrics": {"accuracy": 91.64 - 40 * d},
            "chosen": f == 1.0,
            "note": note,
        }
        for f, d, note in [
            (1.8, 0.0004, "all layers at 8 bits"),
            (1.45, 0.0011, "first allocation"),
            (1.21, 0.0032, ""),
            (1.08, 0.0049, ""),
            (1.0, 0.0061, "met the budget"),
            (0.86, 0.017, "too far"),
            (0.7, 0.09, "too far"),
            (1.6, 0.004, "per-tensor scales"),
        ]
    ]
    return {
        "tersor": "0.1.0",
        "command": "tersor compress examples/zoo.py:resnet20 --data examples/cifar10.py:task "
        '--budget "size=0.15x, drop=0.5" --seed 0 --out runs/resnet20',
        "model": {
            "name": "resnet20",
            "parameters": 269_722,
            "macs": 40_551_040,
            "bytes": 1_095_072,
        },
        "budget": {"size": "0.15x", "drop": 0.5},
        "met": True,
        "file": {"path": "model.tersor", "bytes": after, "ratio": after / 1_095_072, "graph": True},
        "before": {"bytes": 1_095_072, "metrics": {"accuracy": 91.64}},
        "after": {"bytes": after, "metrics": {"accuracy": 91.45}},
        "costs": {
            "batch": 2,
            "latency_ms": {
                "before": 4.31,
                "after": 4.29,
                "p95_before": 4.9,
                "p95_after": 5.0,
                "threads": 1,
            },
            "memory": {"before": 524_288, "after": 524_288},
            "macs": {"before": 40_551_040, "after": 40_551_040},
        },
        "comparison": comparison(rng),
        "layers": layers,
        "sensitivity": sensitivity,
        "points": points,
        "recipe": [
            {
                "method": "quantize.rtn",
                "options": {
                    "bits": 4,
                    "group_size": None,
                    "symmetric": True,
                    "include": ["layer1.*"],
                },
            },
            {"method": "recover.batchnorm", "options": {"samples": 512}},
        ],
        "notes": [
            "calibration uses 512 inputs of train",
            "recover.batchnorm was tried and kept: held-out divergence fell from 0.0094 to 0.0061.",
        ],
        "environment": {
            "python": "3.11.9",
            "torch": "2.13.0+cpu",
            "cpu": "x86-64, 2 cores",
            "seed": 0,
        },
    }


def comparison(rng: np.random.Generator) -> dict:
    classes = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    return {
        "metrics": {
            "accuracy": {
                "before": {
                    "value": 91.64,
                    "low": 89.87,
                    "high": 93.31,
                    "unit": "points",
                    "higher_is_better": True,
                    "n": 1017,
                },
                "after": {
                    "value": 91.45,
                    "low": 89.68,
                    "high": 93.12,
                    "unit": "points",
                    "higher_is_better": True,
                    "n": 1017,
                },
                "delta": -0.19,
                "low": -0.79,
                "high": 0.39,
                "unit": "points",
                "higher_is_better": True,
            }
        },
        "on": "test",
        "divergence": 0.0061,
        "divergence_p95": 0.031,
        "divergence_max": 0.9,
        "divergence_unit": "nats",
        "disagreement": 0.0206,
        "disagreement_low": 0.0135,
        "disagreement_high": 0.0314,
        "flips": {
            "total": 21,
            "broken": 9,
            "fixed": 7,
            "other": 5,
            "examples": [
                {
                    "index": int(rng.integers(0, 1017)),
                    "target": classes[i],
                    "before": classes[i],
                    "after": classes[(i + 3) % 10],
                    "input": {"image": pixels(rng)},
                }
                for i in range(8)
            ],
        },
        "per_class": [
            {
                "class": c,
                "before": 90 + float(b),
                "after": 90 + float(b + d),
                "delta": float(d),
                "n": 100,
            }
            for c, b, d in zip(
                classes, rng.uniform(-5, 6, 10), rng.uniform(-2.5, 2, 10), strict=True
            )
        ],
        "mcnemar": 0.80,
        "cosine": None,
        "notes": [],
        "n": 1017,
    }


def pixels(rng: np.random.Generator) -> str:
    y, x = np.mgrid[0:32, 0:32] / 32
    a, b, c = rng.uniform(0, 6, 3)
    image = np.stack(
        [np.sin(a * x + 3 * y), np.cos(b * y * x * 4), np.sin(c * (x - 0.5) ** 2 * 9 + y)], -1
    )
    raw = np.uint8(127 + 120 * image)
    return address(png(raw))
