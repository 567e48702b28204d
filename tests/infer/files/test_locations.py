"""The cache folder, and which names may be looked up on the Hub."""

from pathlib import Path

import pytest

from draftsmith.infer.files.locations import cache_folder, is_hub_name, may_be_on_hub


@pytest.mark.parametrize("name", ["owner/model", "Owner-1/model.v2_x", "_a/b"])
def test_owner_and_name_are_a_hub_name(name):
    assert is_hub_name(name)


@pytest.mark.parametrize("name", ["model", "/owner/model", "./owner/model", "../model", "a/b/c", "owner/", "a/b:train"])
def test_paths_and_half_names_are_not_hub_names(name):
    assert not is_hub_name(name)
    assert not may_be_on_hub(name)


def test_a_missing_path_into_a_local_folder_is_never_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert may_be_on_hub("owner/model")
    (tmp_path / "owner").mkdir()
    assert not may_be_on_hub("owner/model")
    assert is_hub_name("owner/model")


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("DRAFTSMITH_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("DRAFTSMITH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/draftsmith")
