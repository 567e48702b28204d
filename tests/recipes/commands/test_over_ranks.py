"""`--tp 2`: the commands over two ranks give, in float32, the tokens and the trees that they give on one."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch

# Over gloo; two CUDA devices are tried in tests/infer/models/tensor_parallel/test_two_devices.py.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on the CPU: hide the CUDA devices")
TIMES = ("propose_s", "score_s", "verify_s", "commit_s", "target_forward_s", "draft_forward_s", "bytes_moved", "step")


@pytest.fixture
def asked(rows_file):
    rows = [
        {"question_id": number, "category": "qa", "turns": [f"the fox {number}, the fox {number}", "and then?"][:turns]}
        for number, turns in enumerate((2, 1, 2, 1))
    ]
    return rows_file(rows, "asked.jsonl")


def traces(out: Path) -> dict[str, list[dict[str, Any]]]:
    """By drafter what every step drafted, tried and kept, without its times."""
    found = {}
    for path in sorted((out / "traces").glob("*.jsonl.gz")):
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        found[path.name] = [
            row | {"trace": {key: value for key, value in row["trace"].items() if key not in TIMES}} for row in rows
        ]
    return found


def answers(out: Path) -> dict[str, list[object]]:
    return {
        path.name: [
            [choice["token_ids"] for choice in json.loads(line)["choices"]] for line in path.read_text().splitlines()
        ]
        for path in sorted((out / "answers").glob("*.jsonl"))
    }


@pytest.mark.parametrize("temperature", [0, pytest.param(0.8, marks=pytest.mark.slow)])
def test_bench_decodes_the_same_tokens_and_trees(call, folders, asked, tmp_path, temperature):
    drafters = (
        f"pld,small:{folders.draft}[top_k=2],sd2:{folders.same_size_draft}[exits=[1,2]],mix=pld+small:{folders.draft}"
    )
    words = ["bench", "--target", folders.target, "--data", asked, "--drafters", drafters, "--max_new_tokens", 24]
    words += ["--temperature", temperature, "--batch_size", 3, "--warmup", 0]
    found = {tp: call(*words, "--tp", tp, "--out", tmp_path / str(tp), "--json").json for tp in (1, 2)}
    assert answers(tmp_path / "2") == answers(tmp_path / "1")
    assert traces(tmp_path / "2") == traces(tmp_path / "1")
    for name, figures in found[2]["drafters"].items():
        assert figures["accepted_length"] == found[1]["drafters"][name]["accepted_length"]
    assert max(row["trace"]["accepted"] for rows in traces(tmp_path / "2").values() for row in rows) >= 2
    facts = [json.loads((tmp_path / tp / "run.json").read_text()) for tp in "12"]
    assert [one["config"]["tp"] for one in facts] == [1, 2]
    assert facts[0]["target"] == facts[1]["target"]


@pytest.mark.slow
def test_answers_and_calibrate_over_two_ranks(call, folders, asked, tmp_path):
    files = {}
    for tp in (1, 2):
        out = tmp_path / f"answers{tp}.jsonl"
        words = ["--target", folders.target, "--data", asked, "--out", out, "--preset", "nucleus", "--drafters", "pld"]
        assert call("answers", *words, "--max_new_tokens", 20, "--tp", tp, "--json").json["answered"] == 4
        files[tp] = [json.loads(line) for line in out.read_text().splitlines()]
    assert files[1] == files[2]
    curves = {}
    for tp in (1, 2):
        words = ["--target", folders.target, "--data", asked, "--drafters", "pld", "--temperature", 0]
        done = call("calibrate", *words, "--max_new_tokens", 20, "--seconds", 0, "--tp", tp, "--json").json
        curves[tp] = (done["prompts"], done["tokens"])
    assert curves[1] == curves[2]


def test_a_wrong_number_of_ranks_is_one_line_before_anything_is_loaded(call, folders, asked, monkeypatch):
    def read(name, **_):
        raise AssertionError(f"the weights of {name} were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    for command in ("generate", "bench", "calibrate --drafters pld", "answers --out new", "serve"):
        data = ["--prompt", "a"] if command == "generate" else [] if command == "serve" else ["--data", asked]
        done = call(*command.split(), "--target", folders.target, *data, "--tp", 4)
        assert (done.code, done.out) == (2, "")
        assert done.err.endswith("split over 4 ranks: it has num_key_value_heads=2, fewer than ranks\n")
        assert len(done.err.splitlines()) == 1
    done = call("generate", "--target", folders.target, "--prompt", "a", "--tp", 0)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    done = call("bench", "--target", folders.target, "--data", asked, "--tp", 2, "--peers", "generate")
    assert done.code == 2
    assert "--peers decode with a target on one device" in done.err
    done = call("answers", "--server", "http://127.0.0.1:1", "--tokenizer", folders.target, "--data", asked,
                "--out", "new", "--tp", 2)  # fmt: skip
    assert done.code == 2
    assert "--tp is for a --target" in done.err


def test_torchrun_starts_the_ranks_and_only_rank_0_speaks(call, folders):
    words = ["generate", "--target", folders.target, "--prompt", "the fox", "--max_new_tokens", "16", "--json"]
    alone = call(*words).json
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        processes.Started(
            processes.COMMAND, *words, "--tp", "2", env={**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert json.loads(ranks[0].stdout)["token_ids"] == alone["token_ids"]
    assert (ranks[1].stdout.strip(), ranks[1].stderr) == ("", "")


@pytest.mark.slow
def test_a_run_whose_rank_was_killed_goes_on_where_it_stopped(call, folders, asked, tmp_path):
    words = ["bench", "--target", folders.target, "--data", asked, "--drafters", "pld", "--max_new_tokens", "64"]
    words += ["--repeats", "6", "--out", str(tmp_path / "run"), "--tp", "2"]
    leader = processes.Started(processes.COMMAND, *words)
    measured = tmp_path / "run" / "unfinished.jsonl"
    try:
        while leader.poll() is None and not (measured.is_file() and measured.read_bytes().count(b"\n") > 2):
            time.sleep(0.005)
        (follower,) = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/stat")
            if path.read_text().rpartition(")")[2].split()[1] == str(leader.pid)
        ]
        os.kill(follower, signal.SIGKILL)
        assert leader.wait(10) == 1
    finally:
        leader.kill()
    assert leader.stderr.splitlines()[-1].startswith("draftsmith: the target is gone: rank 1 was ended by signal 9")
    before = [json.loads(line) for line in measured.read_bytes().splitlines()]
    assert len(before) > 2
    assert not any(outcome["turns"] == [] for visit in before for some in visit.values() for outcome in some)
    assert call(*words).code == 0
    assert not measured.exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["drafters"]["pld"]["equal"] == 4
