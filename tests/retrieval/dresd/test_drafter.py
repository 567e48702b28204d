"""DReSD drafts: lossless everywhere, aligned with the store, deterministic, refused where they do not fit."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from joining import admit

pytest.importorskip("faiss", reason="DReSD's stores need the extra `retrieval`")

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Drafter
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.engine.step import step
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.text.rendering import Rendered
from draftsmith.retrieval import Dresd
from draftsmith.retrieval.dresd.build import build_store

ROWS = 8
SAMPLED = Settings(temperature=0.9, top_k=40, top_p=0.95, seed=11)


def make_rows(settings: Settings, seed: int = 7, new_tokens: int = 40) -> list[Row]:
    """Prompts of uneven length; rows end at different times, so they join and leave."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(ROWS):
        length = int(torch.randint(3, 40, (1,), generator=generator))
        ids = torch.randint(3, 61, (length,), generator=generator).tolist()
        rows.append(Row(str(i), ids, settings, Stops(new_tokens - 3 * i)))
    return rows


def decode(target: HFTarget, drafter: Drafter, rows: Sequence[Row], batch_size: int = 1) -> list[Generation]:
    drafter.bind(target)
    return generate(target, drafter, rows, batch_size=batch_size)


def tokens(generations: Sequence[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


def answers(target: HFTarget, rows: Sequence[Row]) -> list[Rendered]:
    """What the target says to these prompts: an in-distribution corpus."""
    drafter = Empty()
    drafter.bind(target)
    given = generate(target, drafter, rows, batch_size=len(rows))
    return [
        Rendered(row.ids, [0] * row.prompt_tokens + [1] * len(generation.token_ids))
        for row, generation in zip(rows, given)
    ]


@pytest.fixture(scope="session")
def make_store(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[HFTarget, Path]]:
    """A tiny target of a family, and a store of its own answers: to half of the test's prompts, to all of them sampled
    with another seed, and to other prompts. So drafts are often right, and often wrong."""
    made: dict[str, tuple[HFTarget, Path]] = {}

    def make(kind: str) -> tuple[HFTarget, Path]:
        if kind not in made:
            target = HFTarget(make_model(kind))
            corpus = answers(target, make_rows(Settings())[::2])
            corpus += answers(target, make_rows(SAMPLED)[::2])
            corpus += answers(target, make_rows(Settings(temperature=0.5, seed=3)))
            corpus += answers(target, make_rows(SAMPLED, seed=8))
            out = tmp_path_factory.mktemp("stores") / kind
            build_store(target, lambda: corpus, out, dims=16)
            made[kind] = target, out
        return made[kind]

    return make


def assert_tried_hard(generations: Sequence[Generation], deep: int = 2) -> None:
    traces = [trace for generation in generations for trace in generation.traces]
    assert max(trace.accepted for trace in traces) >= deep
    assert any(not tried.accepted for trace in traces for tried in trace.tried)
    assert len({token for generation in generations for token in generation.token_ids}) >= 8


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("settings", [Settings(), SAMPLED], ids=["greedy", "sampled"])
def test_tokens_equal_plain_decoding(make_store: Any, kind: str, settings: Settings) -> None:
    target, store = make_store(kind)
    plain = tokens(decode(target, Empty(), make_rows(settings)))
    for batch_size in (1, 3, 8):
        generations = decode(target, Dresd(str(store), min_confidence=0), make_rows(settings), batch_size)
        assert tokens(generations) == plain
        assert_tried_hard(generations)


def test_a_store_of_these_very_answers_is_accepted_to_its_full_length(make_model: Any, tmp_path: Path) -> None:
    target = HFTarget(make_model("llama"))
    corpus = answers(target, make_rows(Settings()))
    build_store(target, lambda: corpus, tmp_path / "store", dims=32)
    generations = decode(target, Dresd(str(tmp_path / "store"), num_drafts=1, min_confidence=0), make_rows(Settings()))
    for generation in generations:
        assert [trace.accepted for trace in generation.traces[:-1]] == [0] + [10] * (len(generation.traces) - 2)


def test_the_query_of_a_stored_position_finds_that_position(make_store: Any) -> None:
    target, path = make_store("llama")
    drafter = Dresd(str(path))
    drafter.bind(target)
    row = make_rows(Settings())[0]
    start, stream = len(row.ids), list(drafter.store.tokens)
    admit(target, drafter, [row])
    try:
        for _ in range(8):
            state = drafter._states[row]
            assert state.position == len(row.ids) - 1
            sims_NC, offsets_NC = drafter.store.search(drafter.store.project(state.state_D[None]), 1)
            # The first greedy answer stands first in the store, behind the last token of its prompt.
            assert offsets_NC[0, 0] == len(row.ids) - start
            assert stream[offsets_NC[0, 0]] == row.ids[-1]
            assert sims_NC[0, 0] > 1 - 1e-5
            step(target, drafter, [row], Budget(8, 8))
    finally:
        target.release([row])


def test_every_drafted_path_follows_the_newest_token_within_one_stored_document(make_store: Any) -> None:
    target, path = make_store("gpt2")
    drafter = Dresd(str(path), min_confidence=0.01)
    ends = [0, *(int(end) for end in drafter.store.ends)]
    stream = [int(token) for token in drafter.store.tokens]
    documents = [stream[a:b] for a, b in itertools.pairwise(ends)]
    rows, paths = make_rows(Settings()), 0
    drafter.bind(target)
    admit(target, drafter, rows)
    for _ in range(6):
        for row, draft in zip(rows, drafter.propose(rows, [Budget(64, 10)] * len(rows))):
            for node, parent in enumerate(draft.parents):
                path_tokens, at = [draft.tokens[node]], parent
                while at >= 0:
                    path_tokens.insert(0, draft.tokens[at])
                    at = draft.parents[at]
                wanted = [row.ids[-1], *path_tokens]
                assert any(
                    document[i : i + len(wanted)] == wanted for document in documents for i in range(len(document))
                )
                paths += 1
        step(target, drafter, rows, Budget(64, 10))
    target.release(rows)
    assert paths > 50


def test_budgets_and_cut_offs_are_kept(make_store: Any) -> None:
    target, path = make_store("llama")
    rows = make_rows(Settings())[1::2]
    drafts = {}
    for name, drafter, budget in (
        ("all", Dresd(str(path), nodes=64, min_confidence=0), Budget(64, 64)),
        ("few", Dresd(str(path), nodes=5, min_confidence=0), Budget(64, 64)),
        ("short", Dresd(str(path), len_drafts=3, min_confidence=0), Budget(64, 64)),
        ("asked", Dresd(str(path), min_confidence=0), Budget(4, 2)),
        ("likely", Dresd(str(path), nodes=64, min_confidence=0.02), Budget(64, 64)),
        ("alike", Dresd(str(path), nodes=64, min_similarity=0.999, min_confidence=0), Budget(64, 64)),
        ("none", Dresd(str(path)), Budget(0, 0)),
    ):
        drafter.bind(target)
        admit(target, drafter, rows)
        drafts[name] = drafter.propose(rows, [budget] * len(rows))
        target.release(rows)
    assert max(map(len, drafts["all"])) > 5
    assert max(draft.depth for draft in drafts["all"]) == 10
    assert max(map(len, drafts["few"])) == 5
    assert max(draft.depth for draft in drafts["short"]) == 3
    assert max(map(len, drafts["asked"])) <= 4
    assert max(draft.depth for draft in drafts["asked"]) == 2
    assert 0 < sum(map(len, drafts["likely"])) < sum(map(len, drafts["all"]))
    assert all(worth >= 0.02 for draft in drafts["likely"] for worth in worths(draft))
    # Half of these prompts were answered in the store: their last states stand there, and no others are as near.
    assert 0 < sum(map(len, drafts["alike"])) < sum(map(len, drafts["all"]))
    assert sum(map(len, drafts["none"])) == 0


def worths(draft: Draft) -> list[float]:
    """The probability with which each node is reached and accepted."""
    confidences = {trial.node: trial.confidence for trials in draft.trials.values() for trial in trials}
    found: list[float] = []
    for node, parent in enumerate(draft.parents):
        found.append(confidences[node] * (found[parent] if parent >= 0 else 1.0))
    return found


def test_a_prompt_of_one_token_and_a_new_turn_draft_nothing_until_a_state_is_known(make_store: Any) -> None:
    target, path = make_store("llama")
    drafter = Dresd(str(path), min_confidence=0)
    drafter.bind(target)
    row = Row("0", [5], Settings(), Stops(20))
    admit(target, drafter, [row])
    assert len(drafter.propose([row], [Budget(8, 8)])[0]) == 0
    step(target, drafter, [row], Budget(8, 8))
    assert drafter._states[row].position == len(row.ids) - 1
    row.turn([7, 8, 9])
    assert len(drafter.propose([row], [Budget(8, 8)])[0]) == 0
    step(target, drafter, [row], Budget(8, 8))
    assert drafter._states[row].position == len(row.ids) - 1
    target.release([row])


PROPOSE = """
import json, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tiny_models import tiny_model
from test_drafter import drafts_of
from draftsmith.infer.models.hf_target import HFTarget
print(json.dumps(drafts_of(HFTarget(tiny_model("llama")), sys.argv[2])))
"""


def drafts_of(target: HFTarget, store: str) -> list[Any]:
    drafter = Dresd(store, min_confidence=0.01)
    drafter.bind(target)
    rows, drafts = make_rows(Settings()), []
    admit(target, drafter, rows)
    for _ in range(4):
        drafts += drafter.propose(rows, [Budget(64, 10)] * len(rows))
        step(target, drafter, rows, Budget(64, 10))
    target.release(rows)
    return [[draft.tokens, draft.parents] for draft in drafts]


def test_two_processes_propose_identical_trees_from_one_store(make_store: Any) -> None:
    target, path = make_store("llama")
    here = Path(__file__).parent
    script = PROPOSE.replace("sys.path.insert(0, sys.argv[1])", "sys.path[:0] = sys.argv[1].split(':')")
    done = subprocess.run(
        [sys.executable, "-c", script, f"{here}:{here.parents[1] / 'infer'}", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    drafts = json.loads(done.stdout)
    assert drafts == drafts_of(target, str(path))
    assert sum(len(tokens_N) for tokens_N, _ in drafts) > 20


def test_a_store_for_another_target_is_refused(make_store: Any, make_model: Any, shake: Any) -> None:
    _, path = make_store("llama")
    drafter = Dresd(str(path))
    for other in (shake(make_model("llama"), 0.06), make_model("qwen2"), make_model("llama", rope_theta=500.0)):
        if other.config.model_type == "llama" and getattr(other.config, "rope_theta", 0) == 500.0:
            other.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
        with pytest.raises(ValueError, match="another target's states"):
            drafter.bind(HFTarget(other))
    with pytest.raises(ValueError, match="vocabulary of 61"):
        drafter.bind(HFTarget(make_model("llama", vocab_size=64)))
    with pytest.raises(ValueError, match="hidden states"):
        drafter.bind(type("Recorded", (), {"tokenizer": None, "vocab_size": 61, "model": None})())
    # The dtype that it was loaded in makes no other target of it.
    drafter.bind(HFTarget(make_model("llama").to(torch.float32)))


def _damage(path: Path, what: str) -> None:
    manifest = json.loads((path / "store.json").read_text())
    if what == "truncated":
        data = (path / "tokens.bin").read_bytes()
        (path / "tokens.bin").write_bytes(data[:-2])
    elif what == "altered":
        data = bytearray((path / "index.faiss").read_bytes())
        data[-1] ^= 1
        (path / "index.faiss").write_bytes(data)
    elif what == "missing":
        (path / "ends.bin").unlink()
    elif what == "newer":
        (path / "store.json").write_text(json.dumps(manifest | {"format": 99}))
    elif what == "older":
        (path / "store.json").write_text(json.dumps(manifest | {"format": 1}))
    elif what == "lacking":
        parts = {name: part for name, part in manifest["parts"].items() if name != "ends"}
        (path / "store.json").write_text(json.dumps(manifest | {"parts": parts}))
    elif what == "kind":
        (path / "store.json").write_text(json.dumps(manifest | {"kind": "rest"}))
    elif what == "json":
        (path / "store.json").write_text(json.dumps(manifest)[:100])
    elif what == "empty":
        (path / "store.json").unlink()


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("truncated", r"tokens.bin has \d+ bytes, not \d+"),
        ("altered", "index.faiss was altered"),
        ("missing", "ends.bin is missing"),
        ("newer", "format 99, and this draftsmith reads 2: update draftsmith"),
        ("older", "has format 1, and this draftsmith reads 2: build the store again"),
        ("lacking", "lacks part ends"),
        ("kind", "is a rest store; a dresd store is needed"),
        ("json", "not JSON"),
        ("empty", "is not a store"),
    ],
)
def test_a_damaged_or_newer_store_is_refused_with_one_line(
    make_store: Any, tmp_path: Path, what: str, line: str
) -> None:
    _, path = make_store("llama")
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    Dresd(str(copy))
    _damage(copy, what)
    with pytest.raises(ValueError, match=line) as refused:
        Dresd(str(copy))
    assert "\n" not in str(refused.value)


def test_importing_the_drafter_does_not_import_faiss() -> None:
    code = "import sys; import draftsmith.retrieval; sys.exit('faiss' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_without_faiss_one_line_names_the_extra(make_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = make_store("llama")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"draftsmith\[retrieval\]"):
        Dresd(str(path))
