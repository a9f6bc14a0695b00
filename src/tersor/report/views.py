"""What the verbs other than compress and compare show, as data first and as tables from that."""

import inspect
from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tersor.codec.header import Entry, Formed, Header, leaves
from tersor.recipe import defaults_of
from tersor.report import figures
from tersor.report.terminal import comparison_view, grid, notes_view

Data = dict[str, Any]

ROWS = 60


def profile_view(found: Data) -> RenderableType:
    """What a model is: its layers, its totals, its quality."""
    size, macs = found["size"], (found.get("macs") or {}).get("by_layer", {})
    samples = (found.get("macs") or {}).get("batch", 1)
    tensors = [t for t in size["tensors"] if len(t["shape"]) > 1]
    largest = sorted(tensors, key=lambda t: -t["bits"])[:ROWS]
    rows = [
        (
            t["name"],
            t["kind"],
            figures.shape(t["shape"]),
            t["form"],
            figures.size(t["bits"] / 8),
            figures.count(macs[layer] / samples) if (layer := _layer(t)) in macs else "",
        )
        for t in tensors
        if t in largest
    ]
    title = f"the {len(rows)} largest of {len(tensors)} weights" if len(tensors) > ROWS else ""
    head = ["weight", "layer", "shape", "stored as", "bytes", "MACs"]
    return Group(
        Text(f"{found['model']['name']} ({found['model']['type']})", style="bold"),
        _totals(found),
        *_metrics(found.get("quality") or {}),
        Text(),
        grid(head, rows, numeric={4, 5}, title=title),
        *notes_view(found.get("notes") or []),
    )


def _layer(tensor: Data) -> str:
    return str(tensor["name"].rpartition(".")[0])


def _totals(found: Data) -> RenderableType:
    size = found["size"]
    rows = [
        ("parameters", f"{size['parameters']:,}", ""),
        ("stored", figures.size(size["bytes"]), "before entropy coding"),
        ("as safetensors", figures.size(found["safetensors_bytes"]), "decoded"),
    ]
    batch = f"batch {found['macs']['batch']}" if "macs" in found else ""
    if "macs" in found:
        one = found["macs"]["total"] / found["macs"]["batch"]
        rows.append(("multiply-adds", figures.count(one), "per sample"))
    if "latency" in found:
        latency = found["latency"]
        conditions = f"median; p95 {figures.digits(latency['p95_ms'])} ms, {batch}, "
        threads = "1 thread" if latency["threads"] == 1 else f"{latency['threads']} threads"
        rows.append(
            ("latency in torch", f"{figures.digits(latency['median_ms'])} ms", conditions + threads)
        )
    if "memory" in found:
        rows.append(("activations", figures.size(found["memory"]["activations"]), f"peak, {batch}"))
    return grid(["", "", ""], rows, numeric={1})


def _metrics(quality: Data) -> list[RenderableType]:
    rows = [
        (
            name.replace("_", " "),
            figures.value(metric["value"], metric["unit"]),
            figures.interval(metric["low"], metric["high"], metric["unit"]),
            f"{metric['n']:,}",
        )
        for name, metric in quality.items()
    ]
    head = ["metric", "value", "95 % interval", "rows"]
    return [Text(), grid(head, rows, numeric={1, 3})] if rows else []


def sides_view(found: Data) -> RenderableType:
    """Two models: sizes, then the comparison."""
    rows = [
        (
            side,
            found[side]["name"],
            figures.size(found[side]["bytes"]),
            figures.size(found[side]["file_bytes"]) if found[side]["file_bytes"] else "",
            found[side]["parameters"],
        )
        for side in ("before", "after")
    ]
    # Stored is what forms count before entropy coding; a file has that coded, and its graph.
    sizes = grid(["", "model", "stored", "file", "parameters"], rows, numeric={2, 3, 4})
    return Group(sizes, Text(), comparison_view(found["comparison"]))


def of_header(header: Header) -> Data:
    """What a file says about itself as plain values."""
    tensors = [
        {
            "name": entry.names[0],
            "shared_with": list(entry.names[1:]),
            "layer": entry.layer,
            "shape": list(entry.tensor.shape),
            "form": _form(entry, header),
            "bytes": round(header.stored_bytes(entry)),
        }
        for entry in header.entries
    ]
    return {
        "bytes": header.file_bytes,
        "writer": header.writer,
        "graph_bytes": header.program_bytes,
        "chunks": len(header.chunks),
        "tensors": tensors,
        "recipe": header.recipe,
        "metrics": header.metrics,
        "provenance": header.provenance,
    }


def _form(entry: Entry, header: Header) -> str:
    """ "affine, 4 bits" or the type of a plain tensor."""
    if not isinstance(entry.tensor, Formed):
        return str(header.dtype(entry.tensor)).removeprefix("torch.")
    bits = entry.tensor.config.get("bits") or min(
        (8 * header.dtype(leaf).itemsize for leaf in leaves(entry.tensor)), default=0
    )
    return f"{entry.tensor.form}, {bits} bits"


def header_view(found: Data) -> RenderableType:
    """What is in a file."""
    tensors = found["tensors"]
    largest = sorted(tensors, key=lambda t: -t["bytes"])[:ROWS]
    rows = [
        (
            t["name"],
            t["layer"],
            figures.shape(t["shape"]),
            t["form"],
            figures.size(t["bytes"]),
        )
        for t in tensors
        if t in largest
    ]
    graph = (
        f"a graph of {figures.size(found['graph_bytes'])}" if found["graph_bytes"] else "no graph"
    )
    rest = f"the {ROWS} largest of {len(tensors)} tensors" if len(tensors) > ROWS else ""
    steps = [
        Text(f"{number}. {step['method']} {figures.options(step.get('options') or {})}".rstrip())
        for number, step in enumerate(found["recipe"], 1)
    ]
    return Group(
        Text(found["file"], style="bold"),
        Text(
            f"{figures.size(found['bytes'])} in {found['chunks']} chunks: {len(tensors)} tensors "
            f"and {graph}; written by tersor {found['writer']}"
        ),
        Text(),
        grid(["tensor", "layer", "shape", "stored as", "bytes"], rows, numeric={4}, title=rest),
        *([Text("\nrecipe", style="bold"), *steps] if steps else []),
        *_stored("metrics", found["metrics"]),
        *_stored("provenance", found["provenance"]),
    )


def _stored(title: str, values: Data) -> list[RenderableType]:
    lines = [Text(f"{name}: {figures.plain(value)}") for name, value in values.items()]
    return [Text(f"\n{title}", style="bold"), *lines] if lines else []


def verify_view(found: Data) -> RenderableType:
    """That a file is whole, and what was measured."""
    graph = "its graph" if found["graph"] else "no graph"
    rows = [
        (name, "" if both["stored"] is None else f"{both['stored']:.6g}", f"{both['measured']:.6g}")
        for name, both in found["metrics"].items()
    ]
    said = f"{found['file']}: whole; {found['tensors']} tensors and {graph} checked"
    parts: list[RenderableType] = [Text(f"{said}, {figures.size(found['bytes'])}", style="green")]
    if rows:
        parts.append(grid(["metric", "in the file", "measured"], rows, numeric={1, 2}))
    else:
        parts += notes_view(["Only the bytes were checked; give --data to measure what it does."])
    return Group(*parts)


def export_view(found: Data) -> RenderableType:
    """What was exported, and how far it is from the original."""
    rows = [
        (
            row["name"],
            figures.shape(row["shape"]),
            row["stored"],
            figures.size(row["bytes"]),
            row["note"],
        )
        for row in found["layers"][:ROWS]
    ]
    said = [f"{found['path']}: {figures.size(found['bytes'])}"]
    said += [f"opset {found['opset']}"] if "opset" in found else []
    for key, words in (("difference", "exact session"), ("default_difference", "default session")):
        if found.get(key):
            said.append(f"largest relative difference {found[key]['relative']:.1e} ({words})")
    products = found.get("fused") or found.get("products")
    if products:
        said.append(", ".join(f"{count} {kind}" for kind, count in products.items()))
    head = ["weight", "shape", "stored as", "bytes", ""]
    return Group(
        Text("; ".join(said), style="green"),
        grid(head, rows, numeric={3}),
        *notes_view(found.get("notes") or []),
    )


def of_method(name: str, function: Callable[..., Any]) -> Data:
    """A technique as its module describes it."""
    plain = inspect.unwrap(function)
    module = inspect.getdoc(inspect.getmodule(plain)) or ""
    return {
        "method": name,
        "summary": module.partition("\n")[0],
        "about": module,
        "does": inspect.getdoc(plain) or "",
        "options": defaults_of(plain),
    }


def methods_view(rows: list[Data]) -> RenderableType:
    """Every technique in a line."""
    lines = [(row["method"], row["summary"], figures.plain(row["options"])) for row in rows]
    return grid(["method", "what it does", "options"], lines, numeric=set())


def method_view(found: Data) -> RenderableType:
    """One technique in full."""
    return Group(
        Text(found["method"], style="bold"),
        Text(found["about"]),
        Text(f"\n{found['does']}"),
        Text(f"\ndefaults: {figures.plain(found['options'])}"),
    )
