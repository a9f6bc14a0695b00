"""LSTM, GRU and RNN layers as ONNX's own operators, so that the length of sequences stays free.

torch's exporter unrolls them over the steps of the example. `whole_recurrences` of the codec keeps
each one whole, and the functions here say what it is in ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.export import ExportedProgram

from tersor.errors import ExportError
from tersor.surgery.recurrent import original

# Where ONNX's gates are in torch's order: LSTM i, o, f, c of i, f, g, o; GRU z, r, h of r, z, n.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def translations(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """What torch.onnx.export needs to know about the recurrent layers in `program`."""
    from onnxscript import opset18

    found: dict[Any, Callable[..., Any]] = {}
    for node in program.graph.nodes:
        name = original(str(node.target).removesuffix(".default").replace(".", "::", 1))
        if node.op == "call_function" and name is not None:
            rows, columns = node.args[2][1].meta["val"].shape
            if name == "lstm.input" and rows != 4 * columns:
                raise ExportError(
                    f"an LSTM with proj_size={columns} cannot be exported: ONNX has no projections "
                    "in it; put a Linear layer behind an LSTM without proj_size"
                )
            found[node.target] = _translation(name, opset18)
    return found


def _translation(name: str, op: Any) -> Callable[..., Any]:
    from onnxscript.onnx_types import FLOAT

    kind = "RNN" if name.startswith("rnn") else name.removesuffix(".input").upper()
    activation = {"rnn_relu.input": "Relu", "rnn_tanh.input": "Tanh"}.get(name)

    def several(
        input: FLOAT,
        hx: Sequence[FLOAT],
        params: Sequence[FLOAT],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        directions = 2 if bidirectional else 1
        steps = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
        each = len(params) // (num_layers * directions)
        finals: list[list[Any]] = [[] for _ in hx]
        for layer in range(num_layers):
            first = layer * directions
            sets = [params[each * at : each * (at + 1)] for at in range(first, first + directions)]
            states = [op.Slice(state, [first], [first + directions], [0]) for state in hx]
            steps, last = _layer(op, kind, activation, steps, states, sets)
            for collected, state in zip(finals, last, strict=True):
                collected.append(state)
        out = op.Transpose(steps, perm=[1, 0, 2]) if batch_first else steps
        return (out, *(op.Concat(*states, axis=0) for states in finals))

    def single(
        input: FLOAT,
        hx: FLOAT,
        params: Sequence[FLOAT],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        return several(
            input,
            [hx],
            params,
            has_biases,
            num_layers,
            dropout,
            train,
            bidirectional,
            batch_first,
        )

    for function in (several, single):
        tensors = {"input": FLOAT, "params": Sequence[FLOAT]}
        flags = dict.fromkeys(("has_biases", "train", "bidirectional", "batch_first"), bool)
        states = {"hx": Sequence[FLOAT] if function is several else FLOAT}
        # onnxscript reads the types at run time, where they are no longer text.
        function.__annotations__ = tensors | states | flags | {"num_layers": int, "dropout": float}
    return several if kind == "LSTM" else single


def _layer(
    op: Any, kind: str, activation: str | None, steps: Any, states: list[Any], sets: list[Any]
) -> tuple[Any, list[Any]]:
    """One layer: (length, batch, inputs) to (length, batch, directions * hidden) and its states.

    sets: w_ih, w_hh and where there are biases b_ih, b_hh of each direction
    """
    order = _GATES[kind]
    weights, recurrent = (
        op.Concat(*(op.Unsqueeze(_ordered(op, one[at], order), [0]) for one in sets), axis=0)
        for at in (0, 1)
    )
    biases = None
    if len(sets[0]) == 4:
        rows = [op.Concat(*(_ordered(op, b, order) for b in one[2:]), axis=0) for one in sets]
        biases = op.Concat(*(op.Unsqueeze(row, [0]) for row in rows), axis=0)
    attributes: dict[str, Any] = {
        "hidden_size": int(sets[0][1].shape[1]),
        "direction": "bidirectional" if len(sets) == 2 else "forward",
    }
    if kind == "GRU":
        attributes["linear_before_reset"] = 1
    if activation is not None:
        attributes["activations"] = [activation] * len(sets)
    found = getattr(op, kind)(steps, weights, recurrent, biases, None, *states, **attributes)
    # (length, directions, batch, hidden), then the last state of each kind.
    joined = op.Reshape(op.Transpose(found[0], perm=[0, 2, 1, 3]), [0, 0, -1])
    return joined, list(found[1 : 1 + len(states)])


def _ordered(op: Any, tensor: Any, order: tuple[int, ...]) -> Any:
    """Gates stacked along the first dimension, in another order."""
    if len(order) == 1:
        return tensor
    gates = op.Split(tensor, num_outputs=len(order), axis=0)
    return op.Concat(*(gates[at] for at in order), axis=0)
