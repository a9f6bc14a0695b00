"""The tools behind `make check` find what they are there to find."""

import sys

import pytest

import make_help
import run_docs

PAGE = """\
# A page

```python
x = 6
```

Text between blocks, and a list:

- ```python
  assert x * 7 == 42, x
  ```

<!-- skip: needs a printer -->
```python
raise SystemExit("ran a skipped block")
```

<!-- needs: json, no_such_module -->
```python
raise SystemExit("ran a block without its module")
```

```console
$ tersor is-not-run
```
"""


def test_blocks_share_a_namespace_and_keep_the_pages_line_numbers():
    script = run_docs.to_script(PAGE)
    assert len(script.lines) == len(PAGE.splitlines())
    assert script.lines[3] == "x = 6"
    assert script.lines[9] == "assert x * 7 == 42, x"
    assert script.lines.count("") == len(script.lines) - 2
    assert script.blocks == 2


def test_blocks_left_out_say_why():
    reasons = run_docs.to_script(PAGE).skipped
    assert reasons == [
        "14: block skipped: needs a printer",
        "19: block skipped: needs no_such_module",
    ]


def test_a_block_that_is_never_closed_is_refused():
    with pytest.raises(ValueError, match="opens on line 2 is never closed"):
        run_docs.to_script("\n```python\nx = 1\n")


@pytest.mark.parametrize(("code", "status"), [("assert 1 + 1 == 2", 0), ("assert 1 + 1 == 3", 1)])
def test_a_page_fails_when_a_block_does(tmp_path, capsys, code, status):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```python\n{code}\n```\n")
    assert run_docs.main([str(page)]) == status
    assert ("line 4" in capsys.readouterr().out) == bool(status)


def test_only_console_blocks_marked_to_run_become_calls():
    block = "```console\n$ tersor inspect a.tersor \\\n    --json\n{...}\n```\n"
    assert run_docs.to_script(block).blocks == 0
    script = run_docs.to_script(f"<!-- run -->\n{block}")
    assert "'inspect', 'a.tersor', '--json'], check=True)" in script.lines[3]
    assert [bool(line) for line in script.lines] == [False, False, False, True, False, False]


def test_a_stale_help_page_is_refused(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tersor.cli")
    monkeypatch.setattr(make_help, "PAGE", tmp_path / "help.md")
    monkeypatch.setattr(sys, "argv", ["make_help.py"])
    assert make_help.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_help.py", "--check"])
    assert make_help.main() == 0
    make_help.PAGE.write_text(make_help.PAGE.read_text() + "changed\n")
    assert make_help.main() == 1
    assert "make help-page" in capsys.readouterr().out
