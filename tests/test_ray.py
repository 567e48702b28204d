"""Long jobs on Ray's workers, of which one is killed in the middle: the same bytes as by one process.

One Ray on this machine serves the whole file. Its workers are real processes; `Killing` ends one with SIGKILL.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest

from draftsmith.infer.answers.answer_file import AnswerFile, with_keys
from draftsmith.infer.answers.sharded import answer_shards
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.files.workers import InProcess, OpenWork, Work, Workers, open_workers
from draftsmith.infer.models.load import load_model, load_target
from draftsmith.infer.text.records import read_records
from draftsmith.infer.text.rendering import Rendered
from draftsmith.infer.text.templates import find_template, load_tokenizer
from draftsmith.recipes.commands.answers import _by_engine
from draftsmith.retrieval.dresd import cells
from draftsmith.retrieval.dresd.build import build_store as build_dresd
from draftsmith.retrieval.dresd.cells import build_cells
from draftsmith.retrieval.dresd.index import Lists
from draftsmith.retrieval.dresd.work import ALL_KEYS, BuildFolder
from draftsmith.retrieval.rest.build import build_store as build_rest
from draftsmith.retrieval.store.documents import open_reader, stamp
from draftsmith.train.data.corpus import load_corpus
from draftsmith.train.drafts.exits import TrainContext
from draftsmith.train.teacher import cache, feature_cache
from draftsmith.train.teacher.cache_build import open_or_build
from draftsmith.train.teacher.feature_cache import open_features

TOKENS = 14


@pytest.fixture(scope="module")
def before() -> set[str]:
    """The sockets on which another file's tests left this process listening, before there was a Ray."""
    return set(processes.listening(os.getpid()))


@pytest.fixture(scope="module")
def workers(before: set[str]) -> Iterator[Workers]:
    """Two workers of a Ray on this machine; they get this module's functions by value."""
    with open_workers("local", 2) as two:
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield two


@dataclass
class Killing:
    """Workers of which one dies at its second task's first note: its process is killed, once."""

    workers: Workers
    killed: Path
    in_process = False
    cpu_seconds = 0.0

    @property
    def count(self) -> int:
        return self.workers.count

    def map(self, open_work: OpenWork, tasks: Any, progress: Any = None, shared: Path | None = None) -> Any:
        return self.workers.map(partial(dying, open_work, self.killed), tasks, progress, shared)


def dying(open_work: OpenWork, killed: Path) -> Work:
    work, begun = open_work(), []

    def run(payload: Any, note: Callable[[int, int], None]) -> Any:
        begun.append(payload)

        def noted(rows: int, tokens: int) -> None:
            if len(begun) == 2 and not killed.exists():
                killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            note(rows, tokens)

        return work(payload, noted)

    return run


# Each kill costs another import of torch: the answers' is in the quick tests.
EITHER = pytest.mark.parametrize(
    "kill", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["all live", "killed"]
)


def some_of(workers: Workers, kill: bool, killed: Path) -> Any:
    return Killing(workers, killed) if kill else workers


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def without_times(content: dict[str, bytes]) -> dict[str, Any]:
    """A store's files; of store.json what does not depend on when it was built."""
    said = json.loads(content["store.json"])
    return content | {"store.json": {name: said[name] for name in said if name not in ("build", "provenance")}}


def slow_squares() -> Work:
    def work(number: int, note: Callable[[int, int], None]) -> tuple[int, int]:
        time.sleep(0.05)
        note(1, 10)
        return number * number, os.getpid()

    return work


def test_two_workers_do_each_task_once_and_one_that_is_killed_is_replaced(workers: Workers, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    killing = Killing(workers, tmp_path / "killed")
    found = list(killing.map(slow_squares, enumerate(range(12)), lambda *done: progress.append(done)))
    assert sorted((number, square) for number, (square, _) in found) == [(n, n * n) for n in range(12)]
    alive = {pid for _, (_, pid) in found}
    assert len(alive - {os.getpid()}) >= 2
    assert int((tmp_path / "killed").read_text()) not in {pid for _, (_, pid) in found[-6:]}
    assert progress[-1] == (12, 120)
    assert workers.cpu_seconds > 0


def test_a_task_that_kills_every_worker_is_given_up_in_one_line(workers: Workers) -> None:
    def deadly() -> Work:
        return lambda payload, note: os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ValueError, match="task 0 was given up: its worker died 4 times") as given_up:
        list(workers.map(deadly, [(0, None)]))
    assert "\n" not in str(given_up.value)


def test_a_workers_error_is_this_processs_error(workers: Workers) -> None:
    def refusing() -> Work:
        def work(payload: Any, note: Any) -> None:
            raise ValueError("row 7: no answer\nof two lines" if payload else "row 7: no answer")

        return work

    def wrong() -> Work:
        return lambda payload, note: 1 // payload

    for some in (workers, InProcess()):
        with pytest.raises(ValueError, match=r"^row 7: no answer$"):
            list(some.map(refusing, [(0, 0)]))
        with pytest.raises(ZeroDivisionError):
            list(some.map(wrong, [(0, 0)]))


def test_a_folder_that_a_worker_does_not_see_is_refused(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "touch", lambda path: None)
    with pytest.raises(ValueError, match=rf"does not see {tmp_path}: put it on storage that all machines"):
        list(workers.map(slow_squares, [(0, 1)], shared=tmp_path))


def test_later_tasks_may_depend_on_earlier_results(workers: Workers) -> None:
    for some in (workers, InProcess()):
        results: list[int] = []

        def tasks(results: list[int] = results) -> Iterator[tuple[int, int] | None]:
            yield 0, 2
            while not results:
                yield None
            yield 1, results[0]

        for _, (square, _) in some.map(slow_squares, tasks()):
            results.append(square)
        assert results == [4, 16]


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_local_ray_listens_on_loopback_only_and_reports_nothing(before: set[str], workers: Workers) -> None:
    found = {}
    for pid in processes.descendants(os.getpid()):
        found |= {socket: address for socket, address in processes.listening(pid).items() if socket not in before}
    assert len(found) >= 3, "no listener was found at all"
    assert set(found.values()) <= LOOPBACK
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"id": f"q{i % 20}", "prompt": f"what is {i} times {i}?"} for i in range(24)]
    rows[5] = {"id": "long", "prompt": "x" * 600}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_the_same_bytes(workers: Workers, folders: Any, questions: Path, tmp_path: Path) -> None:
    asked = with_keys(read_records([questions], need="questions"))
    settings = Settings(temperature=0.7, top_p=0.95, seed=3)
    how = ("float32", "cpu", "token", False, TOKENS, 3)
    opened = partial(_by_engine, str(folders.target), "pld", "chat", settings, *how)

    def answer(out: Path, some: Workers) -> bytes:
        with AnswerFile(out, {"seed": 3}) as file:
            answer_shards(opened, asked, file, some, 3)
        return out.read_bytes()

    whole = answer(tmp_path / "one", InProcess())
    killed = tmp_path / "killed"
    assert answer(tmp_path / "two", Killing(workers, killed)) == whole
    assert killed.exists()
    keys = [json.loads(line)["question_id"] for line in whole.splitlines()]
    assert keys == [one.key for one in asked]
    assert len(set(keys)) == 24
    assert len({str(json.loads(line).get("token_ids")) for line in whole.splitlines()}) > 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "one", "one.run.json", "two", "two.run.json"]


@pytest.mark.parametrize("damage", ["torn", "doubled"])
def test_answers_take_over_what_killed_workers_left(folders: Any, questions: Path, tmp_path: Path, damage: str) -> None:
    asked = with_keys(read_records([questions], need="questions"))[:4]
    out = tmp_path / "answers.jsonl"
    out.with_name("answers.jsonl.part").mkdir()
    left = out.with_name("answers.jsonl.part") / "00000000.jsonl"
    row = b'{"question_id": "q2", "output": "kept"}\n'
    left.write_bytes(row + (b'{"question_id": "q3", "out' if damage == "torn" else row))
    (tmp_path / "answers.jsonl.run.json").write_text('{"seed": 3}')
    with AnswerFile(out, {"seed": 3}) as file:
        assert [one.key for one in file.missing(asked)] == ["q0", "q1", "q3"]
    assert out.read_bytes() == row
    left.write_bytes(row + b'{"no": "key"}\n')
    with pytest.raises(ValueError, match=r"00000000\.jsonl: row 2 is not an answer"), AnswerFile(out, {"seed": 3}):
        pass
    with pytest.raises(ValueError, match=r"other settings \(seed\)"), AnswerFile(out, {"seed": 4}):
        pass


@EITHER
def test_a_rest_store_is_the_same_bytes(workers: Workers, word_tokenizer: Path, tmp_path: Path, kill: bool) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"id": f"r{i}", "text": f"number {i} is {i * i}; "} for i in range(1500)]
    rows[700] = {"id": "empty", "messages": [{"role": "user", "content": "?"}]}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def build(out: Path, some: Workers) -> tuple[dict[str, Any], Any]:
        reader = open_reader([str(data)], load_tokenizer(word_tokenizer), "plain", "answers")
        build_rest(out, reader, "plain", {}, stamp([str(data)]), 3000, workers=some)
        return without_times(files(out)), reader.report.to_json()

    whole, report = build(tmp_path / "one", InProcess())
    assert sum(name.endswith(".suffixes") for name in whole) > 5
    assert report["notes"], "no row has a note whose place could be lost"
    assert build(tmp_path / "two", some_of(workers, kill, tmp_path / "killed")) == (whole, report)
    assert (tmp_path / "killed").exists() == kill


def samples() -> list[Rendered]:
    chance = random.Random(5)
    return [
        Rendered([chance.randrange(40) for _ in range(60)], [0] * 8 + [1] * 52)
        for _ in range(40)
    ]  # fmt: skip


@EITHER
def test_a_dresd_store_is_the_same_bytes(workers: Workers, folders: Any, tmp_path: Path, kill: bool) -> None:
    load = partial(load_target, str(folders.target), dtype="float32", device="cpu")
    target = load()

    def build(out: Path, some: Workers) -> dict[str, Any]:
        build_dresd(target, samples, out, index="hnsw", dims=16, shard_positions=150, fit_positions=600, workers=some,
                    load=load)  # fmt: skip
        return without_times(files(out))

    whole = build(tmp_path / "one", InProcess())
    assert build(tmp_path / "two", some_of(workers, kill, tmp_path / "killed")) == whole
    assert (tmp_path / "killed").exists() == kill


@EITHER
@pytest.mark.parametrize("lists", ["memory", "disk"])
def test_compressed_cells_are_the_same_bytes(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: Lists, kill: bool
) -> None:
    monkeypatch.setattr(cells, "SMALLEST_RANGE", 1_500)
    keys = np.random.default_rng(5).normal(size=(11_000, 8)).astype(np.float32)

    def build(out: Path, some: Workers) -> dict[str, bytes]:
        work = BuildFolder(out / "work")
        work.folder.mkdir(parents=True)
        np.save(work.folder / ALL_KEYS, keys)
        build_cells(work, keys, 4, some, out / "index.faiss", lists)
        assert len(list(work.folder.glob("cells-*.faiss"))) == 8
        return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    whole = build(tmp_path / "one", InProcess())
    assert sorted(whole) == ["index.faiss", *["index.lists"] * (lists == "disk")]
    assert build(tmp_path / "two", some_of(workers, kill, tmp_path / "killed")) == whole
    assert (tmp_path / "killed").exists() == kill


def reloaded(target: Path, chats: Path, tokens: Path) -> TrainContext:
    model, tokenizer = load_model(str(target), dtype="float32", device="cpu")
    corpus = load_corpus([str(chats)], find_template("chat", tokenizer), max_length=128, cache=tokens)
    return TrainContext(model, model, corpus, 128, "cpu")


@EITHER
@pytest.mark.parametrize("kind", ["teacher", "features"])
def test_a_cache_is_the_same_bytes(
    workers: Workers,
    target_folder: Path,
    chats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    kill: bool,
) -> None:
    monkeypatch.setattr(cache, "SHARD_POSITIONS", 128)
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1 << 16)
    reload = partial(reloaded, target_folder, chats, tmp_path / "tokens")
    first = reload()

    def build(out: Path, some: Workers) -> dict[str, bytes]:
        run = TrainContext(
            first.target, first.draft, first.corpus, 128, "cpu", workers=lambda: nullcontext(some), reload=reload
        )
        if kind == "teacher":
            open_or_build(str(out), run, top_k=16, temperature=1.0)
        else:
            open_features(str(out), run, ["layer:1"])
        return files(out)

    whole = build(tmp_path / "one", InProcess())
    assert len(whole) > 8
    assert build(tmp_path / "two", some_of(workers, kill, tmp_path / "killed")) == whole
    assert (tmp_path / "killed").exists() == kill


def test_a_worker_with_another_target_is_refused(
    workers: Workers, target_folder: Path, chats: Path, tmp_path: Path, shake: Any
) -> None:
    first = reloaded(target_folder, chats, tmp_path / "tokens")
    other = partial(reloaded, target_folder, chats, tmp_path / "tokens")
    run = TrainContext(
        shake(first.target, 0.01), first.draft, first.corpus, 128, "cpu", workers=lambda: nullcontext(workers),
        reload=other,
    )  # fmt: skip
    with pytest.raises(ValueError, match="a worker has other weights than the process that began the cache"):
        open_or_build(str(tmp_path / "cache"), run, top_k=8, temperature=1.0)


def test_a_lost_row_and_a_lost_shard_are_noticed(folders: Any, questions: Path, tmp_path: Path) -> None:
    """Planted: workers that say that they are done, and have left nothing."""

    class Idle(InProcess):
        def map(self, open_work: OpenWork, tasks: Any, progress: Any = None, shared: Path | None = None) -> Any:
            for number, shard in tasks:
                path = getattr(shard, "path", None)
                if path is not None:
                    path.write_bytes(b"")
                yield number, None

    asked = with_keys(read_records([questions], need="questions"))
    idle = Idle(in_process=False)
    with (
        pytest.raises(ValueError, match="lacks 12 of its answers"),
        AnswerFile(tmp_path / "a.jsonl", {}) as file,
    ):
        answer_shards(lambda: lambda *given: None, asked, file, idle, 3)
