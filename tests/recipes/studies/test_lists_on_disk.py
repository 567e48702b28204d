"""The study of a dense store's lists in memory and on disk, on few keys."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("faiss", reason="DReSD's stores need the extra `retrieval`")

from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.devices import lists_on_disk as study


def test_both_find_the_same_and_the_lists_on_disk_are_mapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "_apart", lambda work, *given: work(*given))
    words = ["--keys", "10500", "--dims", "8", "--queries", "40"]
    found = run_study(study.lists_on_disk, [*words, "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert found["same_neighbours"]
    assert found["disk"]["mb"] == pytest.approx(found["memory"]["mb"], rel=0.2)
    assert found["disk"]["query_p50_ms"] > 0
    assert len(study._lines(found)) == 3
