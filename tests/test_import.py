"""`import tersor` brings torch and little else; what is heavy is imported where it is used."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import tersor

EXTRAS = {
    *("onnx", "onnxruntime", "onnxscript", "onnx_ir", "transformers", "tokenizers"),
    *("sklearn", "scipy", "pandas", "pyarrow", "PIL", "datasets", "sentence_transformers"),
    *("lightning", "pytorch_lightning", "accelerate", "cryptography", "flwr"),
}
LATER = EXTRAS | {
    *("pydantic", "typer", "click", "rich", "yaml", "zstandard", "sqlite3", "jinja2"),
    *("sympy", "torch._dynamo", "torch._inductor", "torch.export", "torch.onnx"),
}
LIGHT = {"tersor", "numpy", "safetensors"}


def loaded_by(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


def test_import_brings_torch_and_nothing_heavy():
    added = loaded_by("import torch, tersor") - loaded_by("import torch")
    assert "tersor" in added
    assert added & LATER == set()
    third_party = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert third_party - {"torch"} <= LIGHT
    # torch's own lazily loaded parts count too: a handful is a helper, hundreds are a compiler.
    assert sum(name.startswith("torch.") for name in added) < 20


def test_every_public_name_is_there_without_any_extra():
    assert loaded_by("from tersor import *") & EXTRAS == set()


def test_rooms_open_without_an_import_of_their_own():
    names = ["task.classification", "measure.size", "errors.BudgetError", "plan.Limit"]
    for name in names:
        assert "tersor" in loaded_by(f"import tersor; tersor.{name}")
    assert {"task", "measure", "Budget"} <= set(dir(tersor))


def test_type_checkers_see_the_names_that_programs_get():
    tree = ast.parse(Path(tersor.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {a.asname for node in block.body for a in node.names}
    assert shown | {"__version__"} == set(dir(tersor))
    assert all(getattr(tersor, name) is not None for name in shown)
