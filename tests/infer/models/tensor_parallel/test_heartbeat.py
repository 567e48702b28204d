"""Which ranks are taken for lost: those that are silent or hang in a pass, and never those that are busy."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from draftsmith.infer.models.tensor_parallel import heartbeat
from draftsmith.infer.models.tensor_parallel.heartbeat import (
    BEAT_S,
    KEY,
    LOADING_S,
    SILENT_S,
    SLACK_S,
    LifeWatch,
    PassTimes,
    beat,
)

LOOKS = int(SILENT_S / BEAT_S)


class Watched:
    """Rank 0's watch over two other ranks, looked at by hand."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.ranks: Any = SimpleNamespace(size=3, inside=False, failure="", passes=0, tokens=0, times=PassTimes())
        self.watch = LifeWatch(self.store, self.ranks, lambda reason: None)
        self.count = 0

    def look(self, *alive: int) -> str:
        self.count += 1
        for rank in alive:
            self.store.set(KEY.format(rank), str(self.count))
        return self.watch.look()


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_a_rank_that_falls_silent_is_lost_and_the_others_are_not(watched: Watched) -> None:
    assert [watched.look(1, 2) for _ in range(100)] == [""] * 100
    assert [watched.look(1) for _ in range(LOOKS - 1)] == [""] * (LOOKS - 1)
    assert watched.look(1) == "rank 2 has stopped: no sign of life for 10 s"


def test_a_rank_that_never_gave_a_sign_is_lost(watched: Watched) -> None:
    assert [watched.look(2) for _ in range(LOOKS)][-1] == "rank 1 has stopped: no sign of life for 10 s"


def test_a_rank_that_loads_may_be_silent_for_longer(watched: Watched) -> None:
    watched.ranks.inside = True
    assert not any(watched.look(1) for _ in range(int(LOADING_S / BEAT_S) - 1))
    assert watched.look(1) == "rank 2 has stopped: no sign of life for 60 s"


def test_a_late_sign_is_in_time_if_it_comes_before_the_last_look(watched: Watched) -> None:
    for _ in range(5):
        assert not any(watched.look(1) for _ in range(LOOKS - 1))
        assert watched.look(1, 2) == ""


def test_first_passes_and_loads_may_take_any_time(watched: Watched) -> None:
    watched.ranks.inside, watched.ranks.tokens = True, 32_000
    assert not any(watched.look(1, 2) for _ in range(5_000))
    watched.ranks.times.note(512, 1.0)
    watched.ranks.tokens = 0  # not a pass, or one that is not timed
    assert not any(watched.look(1, 2) for _ in range(5_000))


def test_a_pass_that_does_not_end_is_found_by_what_passes_took(watched: Watched) -> None:
    watched.ranks.times.note(1, 0.05)
    watched.ranks.inside, watched.ranks.tokens = True, 1
    found = [watched.look(1, 2) for _ in range(int(SLACK_S / BEAT_S) + 2)]
    assert set(found[:-1]) == {""}
    assert found[-1] == "a pass has not ended within 60 s: a rank hangs in it"


def test_each_pass_has_its_own_time(watched: Watched) -> None:
    watched.ranks.times.note(1, 0.05)
    watched.ranks.inside, watched.ranks.tokens = True, 1
    for number in range(10):
        watched.ranks.passes = number
        assert not any(watched.look(1, 2) for _ in range(int(SLACK_S / BEAT_S)))


def test_the_time_of_a_pass_grows_with_its_tokens_and_with_the_slowest_so_far() -> None:
    times = PassTimes()
    assert times.most(1) == float("inf")
    times.note(512, 512.0)  # a slow CPU
    times.note(512, 1.0)
    assert times.most(1) == 60
    assert times.most(512) == 30 * 512


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    monkeypatch.setattr(heartbeat, "SILENT_S", 0.3)


@pytest.mark.usefixtures("fast")
def test_the_watch_reports_once_and_ends(watched: Watched) -> None:
    beat(watched.store, 1)
    reasons: list[str] = []
    found = threading.Event()

    def lost(reason: str) -> None:
        reasons.append(reason)
        found.set()

    watch = LifeWatch(watched.store, watched.ranks, lost)
    watch.start()
    assert found.wait(20)
    watch.close()
    assert reasons == ["rank 2 has stopped: no sign of life for 0.3 s"]


@pytest.mark.usefixtures("fast")
def test_a_watch_that_is_closed_reports_nothing(watched: Watched) -> None:
    for rank in (1, 2):
        beat(watched.store, rank)
    reasons: list[str] = []
    watch = LifeWatch(watched.store, watched.ranks, reasons.append)
    watch.start()
    threading.Event().wait(0.05)
    watch.close()
    assert reasons == []
    assert not any(thread.name == "ranks" and thread.is_alive() for thread in threading.enumerate())
