"""A file appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from keras_dsr import files
from keras_dsr.files import replacing, workspace


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "model.keras"
    path.write_text("old")
    with replacing(path) as beside:
        assert beside.parent == path.parent
        assert beside.suffix == path.suffix
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "model.keras"
    path.write_text("old")

    def half():
        with replacing(path) as beside:
            beside.write_text("half of the n")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_workspace_is_hidden_and_goes_away(tmp_path):
    path = tmp_path / "model.onnx"

    def failing():
        with workspace(path) as folder:
            (folder / path.name).write_text("half")
            raise RuntimeError("stopped")

    with workspace(path) as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".")
        (folder / path.name).write_text("whole")
        (folder / path.name).replace(path)
    with pytest.raises(RuntimeError, match="stopped"):
        failing()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "whole"


def test_what_killed_processes_left_is_removed_but_not_what_living_ones_write_to(tmp_path):
    left, other = tmp_path / ".model-exporting-00", tmp_path / ".another-exporting-00"
    for folder in (left, other):
        folder.mkdir()
        (folder / "part").write_text("a")
    with workspace(tmp_path / "model") as first, workspace(tmp_path / "model") as second:
        if files.fcntl is not None:
            assert not left.exists()
        assert first != second
        assert first.is_dir()
    assert (other / "part").is_file()
    assert not first.exists()
    assert not second.exists()


def test_where_another_disk_is_mounted_the_workspace_is_in_it(tmp_path, monkeypatch):
    base = tmp_path / "digits"
    base.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self == base)
    with workspace(base) as folder:
        assert folder.parent == base
    assert list(base.iterdir()) == []
