"""Runs the code in README.md and docs/: every python block, and each console block marked to run.

A page becomes one script with the page's own line numbers, run in an empty folder that has
`examples` inside and `../shared/data` beside it, as a checkout has. Comments before a block:

    <!-- needs: shared-data, onnx -->   only where that data or those modules are there
    <!-- skip: why -->                  never
    <!-- run -->                        a console block's `$ tersor ...` lines must exit with 0
"""

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TERSOR_SHARED_DATA", ROOT.parent / "shared" / "data"))
FENCE = re.compile(r"( *(?:(?:[-*+]|\d+\.) +)?)(`{3,})\s*(?:\{code-block\}\s*)?(\w*)")
COMMENT = re.compile(r"<!--\s*(skip|needs|run)\s*(?::\s*(.*?))?\s*-->")


@dataclass
class Script:
    """A page as Python code, line for line, and the blocks left out with their reasons."""

    lines: list[str] = field(default_factory=list)
    blocks: int = 0
    skipped: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Runs the given pages, or all of them; returns 1 if any fails."""
    parser = argparse.ArgumentParser(description="Run the code blocks of Markdown pages.")
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md and docs/**/*.md")
    pages = parser.parse_args(arguments).pages
    pages = pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    # A page on each core: most of its time is spent on loading torch.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        failed = [page for page, well in zip(pages, pool.map(run, pages), strict=True) if not well]
    if failed:
        print("failed:", *(os.path.relpath(page, ROOT) for page in failed))
    return 1 if failed else 0


def run(page: Path) -> bool:
    """Runs one page and says how it went."""
    script = to_script(page.read_text(encoding="utf-8"))
    name = os.path.relpath(page, ROOT)
    for reason in script.skipped:
        print(f"{name}:{reason}")
    if not script.blocks:
        return True
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder, "checkout")
        checkout.mkdir()
        (checkout / "examples").symlink_to(ROOT / "examples")
        if DATA.is_dir():
            Path(folder, "shared").mkdir()
            Path(folder, "shared", "data").symlink_to(DATA)
        path = Path(folder, name.replace(os.sep, "_").removesuffix(".md") + ".py")
        path.write_text("\n".join(script.lines) + "\n", encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
        done = subprocess.run(
            [sys.executable, path],
            cwd=checkout,
            env={"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
    verdict = "ok" if done.returncode == 0 else "FAILED"
    print(f"{name}: {script.blocks} blocks {verdict}, {time.monotonic() - start:.1f} s", flush=True)
    if done.returncode:
        print(textwrap.indent(done.stdout + done.stderr, "    "))
    return done.returncode == 0


def to_script(page: str) -> Script:
    """Blanks every line of a page that is not code to run."""
    lines, script = page.splitlines(), Script()
    notes: dict[str, str] = {}
    at = 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if not fence:
            note = COMMENT.search(lines[at])
            if note:
                notes[note[1]] = note[2] or ""
            elif lines[at].strip():
                notes = {}
            script.lines.append("")
            at += 1
            continue
        end = at + 1
        while end < len(lines) and lines[end].strip() != fence[2]:
            end += 1
        if end == len(lines):
            raise ValueError(f"the block that opens on line {at + 1} is never closed")
        body = [line.removeprefix(" " * len(fence[1])) for line in lines[at + 1 : end]]
        script.lines += ["", *_runnable(fence[3], body, notes, at + 1, script), ""]
        notes, at = {}, end + 1
    return script


def _runnable(
    language: str, body: list[str], notes: dict[str, str], line: int, script: Script
) -> list[str]:
    """The code of one block, or as many empty lines if it is not to run."""
    blank = [""] * len(body)
    if language != "python" and not (language == "console" and "run" in notes):
        return blank
    reason = notes.get("skip") or _missing(notes.get("needs", ""))
    if reason:
        script.skipped.append(f"{line}: block skipped: {reason}")
        return blank
    script.blocks += 1
    return body if language == "python" else _commands(body)


def _missing(needs: str) -> str:
    """What of a comma-separated list of modules, or shared-data, is not there."""
    wanted = [need.strip() for need in needs.split(",") if need.strip()]
    missing = [
        need
        for need in wanted
        if (not DATA.is_dir() if need == "shared-data" else not importlib.util.find_spec(need))
    ]
    return f"needs {', '.join(missing)}" if missing else ""


def _commands(body: list[str]) -> list[str]:
    """One call per `$ tersor ...` command, on the line where the command ends."""
    program = str(Path(sys.executable).with_name("tersor"))
    code, command = [], ""
    for line in body:
        continues = command.endswith("\\")
        command = command.removesuffix("\\") + line.strip() if continues else line.strip()
        call = ""
        if command.startswith("$ tersor") and not command.endswith("\\"):
            words = [program, *shlex.split(command.removeprefix("$ tersor"))]
            call = f"__import__('subprocess').run({words!r}, check=True)"
        code.append(call)
    return code


if __name__ == "__main__":
    sys.exit(main())
