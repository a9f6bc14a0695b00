"""Writes docs/help.md: what `tersor --help` and each verb's `--help` say.

python tools/make_help.py           write it
python tools/make_help.py --check   fail if it is not up to date
"""

import importlib.util
import os
import sys
from pathlib import Path

# Typer lays the help out for the terminal it finds; these make every machine the same.
os.environ.update(TERMINAL_WIDTH="100", COLUMNS="100", NO_COLOR="1", TERM="dumb")
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"

PAGE = Path(__file__).resolve().parents[1] / "docs" / "help.md"
INTRODUCTION = """\
# Command line

Made from the command line's own help by `make help-page`; `make check` compares the two.
"""


def page() -> str:
    """The whole page."""
    import typer.main
    from typer.testing import CliRunner

    from tersor.cli import app

    sections = [INTRODUCTION]
    for verb in ["", *typer.main.get_command(app).commands]:
        shown = CliRunner().invoke(app, [*([verb] if verb else []), "--help"], prog_name="tersor")
        if shown.exit_code:
            raise RuntimeError(f"tersor {verb} --help failed: {shown.output}") from shown.exception
        text = "\n".join(line.rstrip() for line in shown.output.strip("\n").splitlines())
        sections.append(f"## tersor {verb}".rstrip() + f"\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(sections)


def main() -> int:
    """Writes the page, or compares it with what would be written."""
    if not importlib.util.find_spec("tersor.cli"):
        print("no command line yet, so no help page")
        return 0
    if "--check" not in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        print("docs/help.md does not say what `tersor --help` says; run `make help-page`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
