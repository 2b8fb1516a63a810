"""Files and folders that are written wholly or not at all."""

import os
from pathlib import Path

import pytest

from bakeoff._files import atomic_folder, write_text


def test_a_folder_takes_the_place_of_another_wholly(tmp_path):
    target = tmp_path / "there" / "model"
    for content in ("first", "second"):
        with atomic_folder(target) as scratch:
            assert list(scratch.iterdir()) == []
            write_text(scratch / f"{content}.txt", content)
            (scratch / "inner").mkdir()
        names = sorted(path.name for path in target.iterdir())
        assert names == sorted([f"{content}.txt", "inner"])
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o700 == 0o700


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "model"
    with atomic_folder(target) as scratch:
        write_text(scratch / "old.txt", "old")

    def half_written(path):
        with atomic_folder(path) as scratch:
            write_text(scratch / "new.txt", "half")
            raise error

    for path in (target, tmp_path / "none"):
        with pytest.raises(error):
            half_written(path)
        assert list(tmp_path.iterdir()) == [target]
        assert [path.name for path in target.iterdir()] == ["old.txt"]


def test_a_folder_that_cannot_take_its_place_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    write_text(target / "old.txt", "old")
    replace = os.replace

    def refuse(source, destination):
        if Path(source).name == "model" and Path(source).parent != tmp_path:
            raise OSError("no")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"), atomic_folder(target):
        pass
    assert list(tmp_path.iterdir()) == [target]
    assert [path.name for path in target.iterdir()] == ["old.txt"]
