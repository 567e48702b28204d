"""The studies of targets over ranks measure what they say, on a tiny model over two processes."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from draftsmith.infer.models.tensor_parallel.ranks import Ranks
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.devices.engines import engines, memory
from draftsmith.recipes.studies.devices.random_target import cpu_seconds, random_folder
from draftsmith.recipes.studies.devices.ranks import counting, over_ranks

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on the CPU: hide the CUDA devices")


def test_exchanges_are_counted_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(*given: Any) -> None:
        time.sleep(0.01)

    monkeypatch.setattr(dist, "all_reduce", sleep)
    monkeypatch.setattr(Ranks, "send", sleep)
    with counting() as found:
        dist.all_reduce(torch.zeros(1))
        Ranks.send(object.__new__(Ranks), "message")
    dist.all_reduce(torch.zeros(1))
    assert dist.all_reduce is Ranks.send is sleep
    assert found.count == 2
    assert 0.02 <= found.seconds < 1


def test_memory_and_cpu_seconds_are_this_process_s() -> None:
    assert memory("VmHWM") >= memory("VmRSS") > 1 << 20
    with pytest.raises(ValueError, match="VmNothing"):
        memory("VmNothing")
    before = cpu_seconds()
    sum(range(3_000_000))
    assert cpu_seconds()[0] > before[0]


def test_an_unknown_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown shape 'huge': tiny, "):
        random_folder("huge", tmp_path)


@on_a_cpu
@pytest.mark.slow
def test_one_rank_and_two_decode_the_same_and_only_two_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    run_study(over_ranks, ["--shape", "tiny", "--turns", "1", "--new_tokens", "12", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["plain, equal"]
    assert found["pld, equal"]
    assert found["pld, 2"]["accepted_length"] == found["pld, 1"]["accepted_length"] > 1
    # Two sums in each of two layers, and a message.
    assert (found["plain, 1"]["exchanges_per_step"], found["plain, 2"]["exchanges_per_step"]) == (
        0,
        pytest.approx(5, 0.2),
    )
    assert found["plain, 1"]["exchanging"] == 0 < found["plain, 2"]["exchanging"] < 1
    assert all(found[name]["cpu_s"] > 0 for name in ("plain, 1", "plain, 2", "pld, 1", "pld, 2"))


@on_a_cpu
@pytest.mark.slow
def test_engines_load_shares_and_are_timed_in_turns(capfd: pytest.CaptureFixture[str]) -> None:
    found = run_study(engines, ["--shape", "tiny", "--turns", "3", "--tokens", "[1,4]", "--json"])
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1])["tp"] == 2
    there = find_spec("deepspeed") is not None
    assert list(found["engines"]) == (["tp_plan", "AutoTP"] if there else ["tp_plan"])
    assert there or "DeepSpeed is not installed (pip install '.[deepspeed]'): only tp_plan is measured" in err
    assert found["logits_differ_by"] < 1e-4
    for one in found["engines"].values():
        assert list(one["pass_ms"]) == [1, 4]
        assert min(one["pass_ms"].values()) > 0
        assert len(one["load"]) == 2
        assert all(0 < rank["held_bytes"] for rank in one["load"])
