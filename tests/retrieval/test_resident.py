"""What a process holds of mapped files, and a bound on it that others' files do not upset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from draftsmith.retrieval.resident import STATM, Residency, resident_mb

pytestmark = pytest.mark.skipif(not STATM.exists(), reason="what is resident is told by Linux alone")


class Told:
    """A store that counts its releases."""

    def __init__(self) -> None:
        self.releases = 0

    def keep_small(self) -> None:
        pass

    def release(self) -> None:
        self.releases += 1


def test_a_file_that_another_maps_costs_one_release_and_not_one_for_every_use(tmp_path: Path) -> None:
    np.zeros(16 * 2**20, np.uint8).tofile(tmp_path / "weights")
    store = Told()
    residency = Residency(store, 4.0)
    assert store.releases == 1
    before = resident_mb()
    weights = np.memmap(tmp_path / "weights", np.uint8, "r")
    assert int(weights[::512].sum()) == 0
    assert resident_mb() > before + 12
    for _ in range(20):
        residency.check()
    assert store.releases == 2
    del weights
