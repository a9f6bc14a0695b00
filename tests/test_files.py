"""A file is written in one piece, or what was there before stays."""

import errno
import os

import pytest

from tersor.errors import OutputError
from tersor.files import atomic, drafts, write_text


def test_text_replaces_what_was_there_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    assert write_text(path, "größer") == path
    assert path.read_bytes() == "größer".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_is_left_early_changes_nothing(tmp_path, error):
    path = tmp_path / "model.tersor"
    path.write_text("old")

    def stopped():
        with atomic(path) as draft:
            draft.write_text("half of the n")
            raise error

    with pytest.raises(error):
        stopped()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "model.tersor"
    path.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left on device.*untouched.*has room"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_and_a_place_that_is_none_are_refused(tmp_path):
    with pytest.raises(OutputError, match="is a folder; give the path of a file in it"):
        write_text(tmp_path, "text")
    with pytest.raises(OutputError, match="Choose a folder that exists"):
        write_text(tmp_path / "missing" / "file", "text")


def test_drafts_are_what_a_killed_program_left_and_nothing_else(tmp_path):
    for name in (".gitignore", "model.tersor", "notes.part"):
        (tmp_path / name).write_text("mine")
    with atomic(tmp_path / "model.tersor") as draft:
        assert drafts(tmp_path) == [draft]
    assert drafts(tmp_path) == []
