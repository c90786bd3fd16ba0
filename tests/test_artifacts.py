"""Directories that appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from rotpruner.artifacts import new_directory


def test_a_directory_is_replaced_whole(tmp_path):
    target = tmp_path / "export"
    for content in ("old", "new"):
        with new_directory(target, replace=True) as scratch:
            (scratch / "file").write_text(content)
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_what_was_there_stays_if_its_successor_cannot_take_its_place(tmp_path, monkeypatch):
    target = tmp_path / "export"
    target.mkdir()
    (target / "file").write_text("old")
    renamed, original = [], os.replace

    def fails_at_the_second(source, destination):
        renamed.append(source)
        if len(renamed) == 2:
            raise OSError("no")
        original(source, destination)

    monkeypatch.setattr(os, "replace", fails_at_the_second)
    with pytest.raises(OSError, match="no"), new_directory(target, replace=True) as scratch:
        (scratch / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
