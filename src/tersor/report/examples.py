"""Samples whose decision changed, fetched from the data so that a reader can judge for himself."""

from typing import Any

from torch import Tensor

from tersor.report.image import address, picture, png
from tersor.report.sections import EXAMPLES, TEXT
from tersor.task import Inputs, Task

Data = dict[str, Any]


def illustrate(report: Data, task: Task) -> Data:
    """Adds to each flipped example what the network saw: {"image": ...} or {"text": ...}.

    Only classification has samples that can be found by their number. The report is changed.
    """
    flips = (report.get("comparison") or {}).get("flips") or {}
    wanted = {
        int(example["index"]): example for example in (flips.get("examples") or [])[:EXAMPLES]
    }
    if task.kind != "classification" or not wanted or not task.has_test:
        return report
    start = 0
    for inputs, targets in task.test():
        for index in [i for i in wanted if start <= i < start + len(targets)]:
            wanted.pop(index)["input"] = _seen(inputs, index - start, task)
        start += len(targets)
        if not wanted:
            break
    return report


def _seen(inputs: Inputs, row: int, task: Task) -> Data:
    if isinstance(inputs, dict) and "input_ids" in inputs:
        return _text(inputs["input_ids"][row], task.tokenizer)
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    first = first[0] if isinstance(first, tuple) else first
    pixels = picture(first[row].detach().cpu().numpy()) if first.dim() in (3, 4) else None
    if pixels is not None:
        return {"image": address(png(pixels))}
    values = first[row].flatten()[:8].tolist() if first.dim() == 2 else []
    return {"text": ", ".join(f"{value:.4g}" for value in values)} if values else {}


def _text(ids: Tensor, tokenizer: Any) -> Data:
    if not hasattr(tokenizer, "decode"):
        return {}
    return {"text": str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))[: TEXT + 1]}
