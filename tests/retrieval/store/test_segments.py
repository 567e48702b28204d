"""Stores as artefacts: whole or refused in one line, resumed after a kill, changed under readers that lose nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest

from draftsmith.recipes.cli.main import run
from draftsmith.retrieval.rest.build import make_parts
from draftsmith.retrieval.store import writer as store_writer
from draftsmith.retrieval.store.format import MANIFEST, locked
from draftsmith.retrieval.store.segments import Manifest, Store, check_ids, join, stream_dtype
from draftsmith.retrieval.store.writer import append, build, merge, remove

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8], [1, 2, 9], [2] * 7]


@pytest.fixture
def store(tmp_path: Path, retrieval: Any) -> Path:
    path: Path = retrieval.write_store(tmp_path / "store", DOCUMENTS, chunk=5)
    return path


def held(path: Path) -> list[list[int]]:
    return [ids.tolist() for _, ids in Store.open(path, check="checksums").documents()]


def files(path: Path) -> dict[str, bytes]:
    """Everything but the lock and the time of building."""
    found = {file.name: file.read_bytes() for file in path.iterdir() if file.name not in (".lock", MANIFEST)}
    manifest = Manifest.read(path).to_json()
    return found | {MANIFEST: json.dumps({**manifest, "provenance": {}, "build": {}}).encode()}


def test_sixteen_bits_are_used_as_long_as_a_separator_fits_beside_the_ids() -> None:
    assert stream_dtype(65_535) == np.uint16
    assert stream_dtype(65_536) == np.uint32


def test_documents_stand_end_to_end_with_a_separator_behind_each() -> None:
    stream, starts = join([np.array([1, 2]), np.array([], int), np.array([3])], np.dtype(np.uint16))
    assert stream.tolist() == [1, 2, 65_535, 65_535, 3, 65_535]
    assert starts.tolist() == [0, 3, 4, 6]


def test_an_id_outside_the_vocabulary_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"logs\.jsonl row 7: token id 70000 is outside the vocabulary of 65536"):
        check_ids([5, 70_000], 65_536, "logs.jsonl row 7")


def test_what_was_built_is_what_is_read(store: Path) -> None:
    opened = Store.open(store, "rest", "checksums")
    assert held(store) == DOCUMENTS
    assert [told["id"] for told, _ in opened.documents()] == ["d0", "d1", "d2", "d3", "d4"]
    assert (opened.manifest.documents, opened.manifest.tokens) == (5, 18)
    assert len(opened.segments) == 2


def test_a_truncated_file_is_refused_on_opening(store: Path) -> None:
    file = store / "000002.suffixes"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"000002\.suffixes has \d+ bytes, not \d+"):
        Store.open(store)


def test_an_altered_file_is_refused_when_bound_and_verified(store: Path, retrieval: Any) -> None:
    file = store / "000001.tokens"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    Store.open(store)
    with pytest.raises(ValueError, match=r"000001\.tokens was altered"):
        retrieval.bound(store)
    assert run(["store", "verify", str(store)]) == 2


def test_an_altered_store_cannot_make_the_kernels_read_elsewhere(store: Path, retrieval: Any) -> None:
    for file in store.glob("*.suffixes"):
        file.write_bytes(b"\xff" * file.stat().st_size)
    drafter = retrieval.bound(store, verify=False, context_weight=0.0)
    assert [len(draft) for draft in retrieval.propose(drafter, [[1], [2]])] == [0, 0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 99}, "format 99, and this draftsmith reads 1"),
        ({"kind": "dresd"}, "is a dresd store; a rest store is needed"),
        ({"segments": [{"name": "x"}]}, "damaged"),
    ],
)
def test_another_format_or_kind_is_refused(store: Path, change: dict[str, Any], told: str) -> None:
    manifest = json.loads((store / MANIFEST).read_text())
    (store / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=told):
        Store.open(store, "rest")


def test_a_folder_that_is_no_store_a_lost_file_and_broken_json_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a store"):
        Store.open(tmp_path)
    (store / "000001.starts").unlink()
    with pytest.raises(ValueError, match=r"000001\.starts is missing"):
        Store.open(store)
    (store / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Store.open(store)


def test_merge_keeps_every_document_and_leaves_no_old_file(store: Path) -> None:
    merged = merge(store, make_parts)
    assert len(merged.segments) == 1
    assert held(store) == DOCUMENTS
    assert {file.name.split(".")[0] for file in store.iterdir()} == {"000003", "store", ""}


def test_removed_documents_are_gone_from_the_disk_and_the_rest_is_untouched(store: Path) -> None:
    _, removed = remove(store, make_parts, lambda told: told["id"] == "d4")
    assert removed == 1
    assert held(store) == DOCUMENTS[:4]
    assert b"\x02\x00" * 7 not in b"".join(file.read_bytes() for file in store.iterdir())
    assert (store / "000001.tokens").exists()


def test_a_store_is_not_emptied(store: Path) -> None:
    with pytest.raises(ValueError, match="no document would be left"):
        remove(store, make_parts, lambda told: True)
    assert held(store) == DOCUMENTS


def test_an_append_is_seen_by_new_readers_and_harms_no_old_ones(store: Path, retrieval: Any) -> None:
    early, drafter = Store.open(store), retrieval.bound(store)
    _, added = append(store, retrieval.batches_of([[50, 51, 52]]), make_parts)
    merge(store, make_parts)
    assert added == 1
    assert [ids.tolist() for segment in early.segments for ids in [segment.tokens[:1]]]
    assert retrieval.propose(drafter, [[7]])[0].tokens == [8]
    assert len(retrieval.propose(drafter, [[50]])[0]) == 0
    assert retrieval.propose(retrieval.bound(store), [[50]])[0].tokens == [51, 52]


READER = """
import sys, time
from draftsmith.retrieval.store.segments import Store
seen = set()
stop = time.monotonic() + float(sys.argv[2])
while time.monotonic() < stop:
    documents = [ids.tolist() for _, ids in Store.open(sys.argv[1], check="checksums").documents()]
    assert documents[:5] == [[1, 2, 3], [4], [5, 6, 7, 8], [1, 2, 9], [2] * 7], documents
    assert documents[5:] == [[60 + i, 3] for i in range(len(documents) - 5)], documents
    seen.add(len(documents))
print(len(seen))
"""


def test_two_readers_beside_appends_and_merges_lose_nothing(store: Path, retrieval: Any) -> None:
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, str(store), "4"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for i in range(30):
        append(store, retrieval.batches_of([[60 + i, 3]]), make_parts)
        if i % 10 == 9:
            merge(store, make_parts)
        if i >= 3:
            time.sleep(0.15)
    for reader in readers:
        told, _ = reader.communicate(timeout=120)
        assert reader.returncode == 0
        assert int(told) >= 1


def test_one_writer_at_a_time(store: Path) -> None:
    with locked(store), pytest.raises(ValueError, match="being written by another process"):
        merge(store, make_parts)


def write_rows(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"id": f"r{i}", "text": f"number {i} is {i * i}; "}) + "\n" for i in range(count))
    )
    return path


def test_a_build_killed_midway_resumes_to_the_same_store(tmp_path: Path, word_tokenizer: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 4000)
    options = ["--data", str(data), "--tokenizer", str(word_tokenizer), "--chunk_tokens", "4000"]
    killed = processes.Started(processes.COMMAND, "store", "build", "rest", *options, "--out", tmp_path / "killed")
    while killed.stderr.count("\nsegment ") < 3:
        assert killed.poll() is None, killed.stderr
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert killed.stderr.startswith("template: plain, ")
    with pytest.raises(ValueError, match="was not finished"):
        Store.open(tmp_path / "killed")
    first = (tmp_path / "killed.part" / "000001.tokens").stat().st_mtime_ns
    assert run(["store", "build", "rest", *options, "--out", str(tmp_path / "killed")]) == 0
    assert (tmp_path / "killed" / "000001.tokens").stat().st_mtime_ns == first
    assert run(["store", "build", "rest", *options, "--out", str(tmp_path / "whole")]) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(Manifest.read(tmp_path / "whole").segments) > 10
    assert all(Manifest.read(tmp_path / name).build["seconds"] > 0 for name in ("killed", "whole"))
    assert not (tmp_path / "killed.part").exists()


def test_data_that_changed_since_the_kill_begin_anew(tmp_path: Path, word_tokenizer: Path, retrieval: Any) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 20)
    part = tmp_path / "s.part"
    part.mkdir()
    (part / "progress.json").write_text(json.dumps({"job": "another", "taken": 19, "manifest": {}}))
    options = ["--data", str(data), "--tokenizer", str(word_tokenizer), "--out", str(tmp_path / "s")]
    assert run(["store", "build", "rest", *options]) == 0
    assert Manifest.read(tmp_path / "s").documents == 20


@pytest.mark.parametrize(("job", "wanted"), [({"a": 1}, DOCUMENTS), ({"a": 2}, [[7, 8]])])
def test_a_build_killed_before_its_last_rename_is_finished_if_the_same_is_asked_for(
    tmp_path: Path, retrieval: Any, monkeypatch: pytest.MonkeyPatch, job: dict[str, int], wanted: list[list[int]]
) -> None:
    manifest = Manifest("rest", "any", 100, "uint16")

    def die(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_writer.os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "s", manifest, retrieval.batches_of(DOCUMENTS), make_parts, job={"a": 1})
    assert not (tmp_path / "s").exists()
    manifest = Manifest("rest", "any", 100, "uint16")
    built = build(tmp_path / "s", manifest, retrieval.batches_of([[7, 8]]), make_parts, job=job)
    assert held(tmp_path / "s") == wanted
    assert built.documents == len(wanted)
    assert not (tmp_path / "s" / "progress.json").exists()


def test_the_commands_build_append_remove_and_tell(
    tmp_path: Path, word_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    rows = [
        {"id": "new", "prompt": "2 + 2?", "output": "It is four.", "created": now - 86_400},
        {"id": "old", "prompt": "2 + 3?", "output": "It is five.", "created": now - 90 * 86_400},
        {"id": "empty", "prompt": "?", "output": ""},
        {"id": "strange", "nothing": 1},
    ]
    data, more = tmp_path / "logs.jsonl", write_rows(tmp_path / "more.jsonl", 3)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, words = str(tmp_path / "s"), ["--tokenizer", str(word_tokenizer)]
    assert run(["store", "build", "rest", "--data", str(data), *words, "--out", out]) == 0
    assert "row 4" in capsys.readouterr().out
    assert run(["store", "append", out, "--data", str(more), *words]) == 0
    assert run(["store", "remove", out, "--keep_days", "30"]) == 0
    assert run(["store", "remove", out, "--ids", "r1"]) == 0
    kept = [told["id"] for told, _ in Store.open(out).documents()]
    assert "new" in kept
    assert "r0" in kept
    assert not {"old", "r1"} & set(kept)
    assert run(["store", "info", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["documents"] == len(kept)
    assert run(["store", "build", "rest", "--data", str(data), *words, "--out", out]) == 2
    assert "already exists" in capsys.readouterr().err


def test_answers_are_kept_without_their_prompts_unless_all_is_asked_for(tmp_path: Path, word_tokenizer: Path) -> None:
    from draftsmith.infer.text.templates import load_tokenizer

    data, known = tmp_path / "logs.jsonl", load_tokenizer(word_tokenizer)
    data.write_text(json.dumps({"prompt": "2 + 2?", "output": "It is four."}) + "\n")
    texts = {}
    for content in ("answers", "all"):
        out = tmp_path / content
        words = ["--tokenizer", str(word_tokenizer), "--content", content, "--template", "Q: {prompt} A:"]
        assert run(["store", "build", "rest", "--data", str(data), *words, "--out", str(out)]) == 0
        texts[content] = [known.decode(ids.tolist()) for _, ids in Store.open(out).documents()]
    assert texts == {"answers": [" It is four.<end>"], "all": ["Q: 2 + 2? A: It is four.<end>"]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"text": "fine"}\n{"text": "\xff\xfe"}\n', "row 2"),
        (b'{"nothing": 1}\n', "no usable row among 1"),
        (b'{"token_ids": [1, 999]}\n', "row 1: token id 999 is outside the vocabulary"),
    ],
)
def test_wrong_rows_are_refused_with_their_number(
    tmp_path: Path, word_tokenizer: Path, capsys: pytest.CaptureFixture[str], content: bytes, told: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(content)
    options = ["--data", str(data), "--tokenizer", str(word_tokenizer), "--out", str(tmp_path / "s")]
    assert run(["store", "build", "rest", *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
