"""The studies of the rest drafter, on a little text: beside REST's own rule, and at any size."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from draftsmith.recipes.cli.main import run
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.rest_against_peer import rest_against_peer
from draftsmith.recipes.studies.rest_against_suffixes import PEERS, rest_against_suffixes, suffix_caches
from draftsmith.recipes.studies.rest_scale import growth, rest_scale

SIZES = [1e6, 1e7, 1e8]


def test_n_log_n_has_the_power_one_and_other_distributions_are_told_apart():
    assert growth(SIZES, [3e-8 * n * math.log(n) for n in SIZES]) == pytest.approx(1.0)
    assert growth(SIZES, [2e-7 * n for n in SIZES]) < 0.96
    assert growth(SIZES, [1e-14 * n * n for n in SIZES]) > 1.8


def test_one_size_tells_no_growth():
    with pytest.raises(ValueError, match="two sizes"):
        growth([5.0, 5.0], [1.0, 2.0])


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    path = tmp_path / "logs.jsonl"
    rows = [{"prompt": f"{i} + {i}?", "output": f"The sum of {i} and {i} is {2 * i}."} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def store(tmp_path: Path, logs: Path, word_tokenizer: Path) -> Path:
    words = ["--data", str(logs), "--tokenizer", str(word_tokenizer), "--template", "Q: {prompt} A:"]
    assert run(["store", "build", "rest", *words, "--out", str(tmp_path / "store")]) == 0
    return tmp_path / "store"


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_bench_shows_rest_beside_lookup_in_the_prompt_and_rests_own_rule(
    store: Path, logs: Path, word_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--store", str(store), "--data", str(logs), "--tokenizer", str(word_tokenizer), "--limit", "10", "--json"]
    run_study(rest_against_peer, words)
    told = last_line(capsys)
    rest, pld = told["drafters"]["rest"], told["drafters"]["pld"]
    assert told["streams"] == 10
    assert rest["accepted_length"] > pld["accepted_length"] > 1
    assert rest["hit_rate"] > 0.9
    assert 1 < rest["nodes_per_step"] <= 64
    assert rest["accepted_length_interval"][0] <= rest["accepted_length"] <= rest["accepted_length_interval"][1]
    if importlib.util.find_spec("draftretriever"):
        peer = told["drafters"]["draftretriever"]
        assert rest["over_rest_rule"] == pytest.approx(rest["accepted_length"] / peer["accepted_length"])
        assert peer["accepted_length"] > 1


@pytest.mark.slow
def test_scale_builds_and_queries_text_of_the_size_asked_for(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "large"
    words = ["--store", str(store), "--out", str(large), "--tokens", "1000000", "--steps", "40", "--json"]
    run_study(rest_scale, words)
    told = last_line(capsys)
    assert told["store_mb"] * 2**20 > 1_000_000 * 6
    assert told["propose_p50_ms"] > 0
    assert told["accepted_length"] > 1
    assert told["reader_growth_share"] == pytest.approx(told["reader_peak_mb"] / told["store_mb"])
    assert told["reader_peak_mb"] > 0.3 * told["store_mb"]
    assert not large.exists()
    run_study(rest_scale, [*words[:4], "--tokens", "5000", "40000", "--steps", "40", "--json"])
    told = last_line(capsys)
    assert [size["tokens"] for size in told["sizes"]] == [5000, 40000]
    assert told["build_growth"] > 0


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A package of the peer's name: it drafts what followed the newest token, in all answers so far."""
    folder = tmp_path / "peer" / "arctic_inference" / "suffix_decoding"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text(
        "class Found:\n"
        "    def __init__(self, ids): self.token_ids, self.parents = ids, list(range(-1, len(ids) - 1))\n"
        "class SuffixDecodingCache:\n"
        "    def __init__(self): self.seen = []\n"
        "    def start_request(self, key, ids): self.seen += ids\n"
        "    def stop_request(self, key): pass\n"
        "    def add_active_response(self, key, ids): self.seen += ids\n"
        "    def speculate(self, key, ids, max_spec_tokens, use_tree_spec, **limits):\n"
        "        places = [i for i, token in enumerate(self.seen[:-1]) if token == ids[-1]]\n"
        "        return Found(self.seen[places[-1] + 1:][:max_spec_tokens] if places else [])\n"
    )
    return tmp_path / "peer"


def test_rest_without_a_store_is_shown_beside_suffix_trees_at_equal_nodes(
    logs: Path, word_tokenizer: Path, peer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(logs), "--tokenizer", str(word_tokenizer), "--template", "Q: {prompt} A:", "--nodes", "2,6"]
    run_study(rest_against_suffixes, [*words, "--peer", str(peer), "--skip", "5", "--limit", "20", "--json"])
    told = last_line(capsys)
    assert (told["streams"], list(told["nodes"])) == (20, ["2", "6"])
    for nodes, drafters in told["nodes"].items():
        assert list(drafters) == ["rest", *PEERS]
        for name, figures in drafters.items():
            assert 1 < figures["accepted_length"] <= 1 + int(nodes)
            assert 0 < figures["nodes_per_step"] <= int(nodes)
            if name in PEERS:
                ratio = drafters["rest"]["accepted_length"] / figures["accepted_length"]
                assert figures["rest_over_it"] == pytest.approx(ratio)
                assert figures["rest_over_it_interval"][0] <= ratio <= figures["rest_over_it_interval"][1]
    assert told["nodes"]["6"]["rest"]["accepted_length"] > told["nodes"]["2"]["rest"]["accepted_length"]


def test_a_folder_without_the_peer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder arctic_inference"):
        suffix_caches(str(tmp_path))
