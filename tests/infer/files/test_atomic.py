"""A folder is whole or absent."""

import pytest

from draftsmith.infer.files.atomic import folder_beside


def test_a_folder_gets_its_name_only_once_it_is_whole(tmp_path):
    out = tmp_path / "new" / "out"
    with folder_beside(out) as part:
        (part / "file").write_text("whole")
        assert not out.exists()
    assert (out / "file").read_text() == "whole"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    def half():
        with folder_beside(tmp_path / "out") as part:
            (part / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_kept_and_refused_in_one_line(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ValueError, match="could not be written: Directory not empty"), folder_beside(tmp_path / "out"):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
