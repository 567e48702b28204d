"""The reader: every format, every container, and nothing dropped in silence."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from draftsmith.infer.text.record import Message
from draftsmith.infer.text.records import ReadReport, read_records

USER, ASSISTANT = Message("user", "hi"), Message("assistant", "yes")
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
CHOICE = {"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}


def write(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read_one(tmp_path, row):
    (record,) = read_records([write(tmp_path / "file.jsonl", [row])])
    return record


PAIRS = {
    "messages": {"messages": CHAT},
    "messages with the answer beside": {"messages": CHAT[:1], "response": "yes"},
    "content in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, CHAT[1]]},
    "log": {"request": {"messages": CHAT[:1]}, "response": {"choices": [CHOICE]}},
    "completion log": {"request": {"prompt": "hi"}, "response": {"choices": [{"text": "yes"}]}},
    "batch log": {"request": {"body": {"messages": CHAT[:1]}}, "response": {"body": {"choices": [CHOICE]}}},
    "output": {"prompt": "hi", "output": "yes"},
    "response": {"prompt": "hi", "response": "yes"},
    "completion": {"prompt": "hi", "completion": "yes"},
    "answer": {"question": "hi", "answer": "yes"},
    "prompt of messages": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    "alpaca": {"instruction": "hi", "input": "", "output": "yes"},
    "recorded": {"question_id": 1, "category": "c", "turns": ["hi"], "outputs": ["yes"]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_conversation_format_gives_the_same_messages(tmp_path, name):
    record = read_one(tmp_path, PAIRS[name])
    assert record.messages == [USER, ASSISTANT]
    assert (record.questions, record.answers, record.documents) == (["hi"], ["yes"], [])
    assert record.prompt == [USER]
    assert list(record.exchanges()) == [([USER], ASSISTANT)]


def test_alpaca_input_follows_the_instruction(tmp_path):
    record = read_one(tmp_path, {"instruction": "add", "input": "1 2", "output": "3"})
    assert record.questions == ["add\n1 2"]


def test_spec_bench_question_has_all_its_turns_and_no_answer(tmp_path):
    record = read_one(tmp_path, {"question_id": 81, "category": "writing", "turns": ["one", "two"]})
    assert (record.id, record.category, record.kind) == ("81", "writing", "question")
    assert (record.turns, record.questions, record.answers) == (["one", "two"], ["one", "two"], [])
    assert record.prompt == [Message("user", "one")]


def test_prompt_alone_is_a_question(tmp_path):
    assert read_one(tmp_path, {"prompt": "hi"}).turns == ["hi"]
    assert read_one(tmp_path, {"messages": CHAT[:1]}).questions == ["hi"]
    assert read_one(tmp_path, {"request": {"messages": CHAT[:1]}}).answers == []


def test_recorded_turns_and_outputs_interleave(tmp_path):
    record = read_one(tmp_path, {"turns": ["a", "c"], "outputs": ["b", "d"]})
    assert [(m.role, m.content) for m in record.messages] == [
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    ]  # fmt: skip
    assert [len(before) for before, _ in record.exchanges()] == [1, 3]


def test_system_message_and_reasoning_are_kept(tmp_path):
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    record = read_one(tmp_path, {"messages": [{"role": "developer", "content": "be brief"}, CHAT[0], answer]})
    assert record.system == "be brief"
    assert record.messages[-1] == Message("assistant", "yes", "hm")


def test_token_ids_are_used_when_given(tmp_path):
    record = read_one(tmp_path, {"prompt_token_ids": [1, 2], "token_ids": [3]})
    assert (record.kind, record.prompt_token_ids, record.token_ids) == ("token_ids", [1, 2], [3])
    beside = read_one(tmp_path, {"prompt": "hi", "output": "yes", "token_ids": [3]})
    assert (beside.answers, beside.token_ids) == (["yes"], [3])
    logged = {"request": {"prompt": "hi"}, "response": {"choices": [{"text": "yes", "token_ids": [4, 5]}]}}
    assert read_one(tmp_path, logged).token_ids == [4, 5]


@pytest.mark.parametrize("bad", ["12", [1.5], [-1], [True], ["1"]])
def test_token_ids_of_the_wrong_kind_are_counted(tmp_path, bad):
    report = ReadReport()
    path = write(tmp_path / "file.jsonl", [{"token_ids": bad}, {"token_ids": [1]}])
    assert len(list(read_records([path], report=report))) == 1
    assert list(report.skipped) == ["token_ids is not a list of token ids"]


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"created": 1700000000}, 1.7e9),
        ({"timestamp": 1700000000123}, 1700000000.123),
        ({"tstamp": 1700000000.5}, 1700000000.5),
        ({"time": "2023-11-14T22:13:20Z"}, 1.7e9),
        ({"timestamp": "2023-11-14T22:13:20"}, 1.7e9),
        ({"time": 3.2}, None),
        ({"time": True}, None),
        ({"time": "noon"}, None),
        ({}, None),
    ],
)
def test_time_of_a_log(tmp_path, fields, seconds):
    assert read_one(tmp_path, {"text": "a", **fields}).time == seconds


def test_time_is_found_in_the_response_too(tmp_path):
    log = {"request": {"prompt": "hi"}, "response": {"created": 1700000000, "choices": [{"text": "yes"}]}}
    assert read_one(tmp_path, log).time == 1.7e9


def test_ids_are_kept_or_made_of_file_and_row(tmp_path):
    path = write(tmp_path / "talk.v1.jsonl", [{"text": "a", "id": "x"}, "", {"text": "b"}, {"text": "c", "id": 0}])
    records = list(read_records([path]))
    assert [record.id for record in records] == ["x", "talk.v1-3", "0"]
    assert [(record.source, record.row) for record in records] == [(path, 1), (path, 3), (path, 4)]


def containers(folder, rows):
    """The same rows in every container."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (folder / "b.json").write_text(json.dumps(rows))
    (folder / "c.json").write_text(json.dumps({"version": 1, "data": rows}, indent=1))
    (folder / "d.json").write_bytes(lines)
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(lines))
    half = len(rows) // 2
    parts = ["".join(json.dumps(row) + "\n" for row in part).encode() for part in (rows[:half], rows[half:])]
    (folder / "f.jsonl.zst").write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in parts))
    (folder / "g.json.zst").write_bytes(zstandard.ZstdCompressor().compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "h.parquet")
    return sorted(folder.iterdir())


def test_every_container_gives_the_same_records(tmp_path):
    rows = [{"question_id": i, "category": "c", "turns": [f"t{i}", "ü"]} for i in range(300)]
    for path in containers(tmp_path, rows):
        records = list(read_records(path))
        assert [(r.id, r.turns, r.row) for r in records] == [(str(i), [f"t{i}", "ü"], i + 1) for i in range(300)], path


def test_folder_is_read_in_order_with_its_subfolders_and_other_files_are_named(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    write(tmp_path / ".git" / "x.jsonl", [{"text": "hidden"}])
    write(tmp_path / "sub" / "b.jsonl", [{"text": "second"}])
    (tmp_path / "a.py").write_text("first = 1\n")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    report = ReadReport()
    assert [record.text for record in read_records([str(tmp_path)], report=report)] == ["first = 1\n", "second"]
    assert report.ignored == [str(tmp_path / "picture.png")]
    assert any("picture.png" in line for line in report.lines())


def test_json_object_that_is_a_row_is_one_row(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"id": "x", "messages": CHAT}))
    assert [record.messages for record in read_records(tmp_path / "one.json")] == [[USER, ASSISTANT]]


def test_several_sources_limit_and_need(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"text": "a"}, {"prompt": "b"}, {"prompt": "c", "output": "d"}])
    two = write(tmp_path / "two.jsonl", [{"prompt": "e"}])
    assert [record.row for record in read_records([one, two])] == [1, 2, 3, 1]
    assert [record.row for record in read_records([one, two], limit=2)] == [1, 2]
    report = ReadReport()
    assert [r.questions for r in read_records([one, two], need="questions", report=report)] == [["b"], ["c"], ["e"]]
    assert report.skipped["no questions"].places == [f"{one} row 1"]
    assert [r.row for r in read_records([one], need="exchanges")] == [3]


def test_malformed_row_raises_with_file_and_row_or_is_counted(tmp_path):
    path = write(tmp_path / "file.jsonl", [{"text": "a"}, "{broken", {"text": "b"}])
    with pytest.raises(ValueError, match=r"file\.jsonl: row 2 is not valid JSON"):
        list(read_records([path]))
    report = ReadReport()
    assert len(list(read_records([path], on_bad="skip", report=report))) == 2
    assert (report.rows, report.used, report.skipped["not valid JSON"].count) == (3, 2, 1)
    assert f"{path} row 2" in report.skipped["not valid JSON"].places[0]


def test_invalid_utf8_names_the_row(tmp_path):
    (tmp_path / "file.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="row 2 is not valid UTF-8"):
        list(read_records(tmp_path / "file.jsonl"))
    (tmp_path / "file.txt").write_bytes(b"good\nb\xffd")
    with pytest.raises(ValueError, match="row 1 is not valid UTF-8 in line 2"):
        list(read_records(tmp_path / "file.txt"))


UNUSABLE = {
    "no known field": {"label": 3},
    "not an object": 17,
    "an empty user turn": {"prompt": " ", "output": "yes"},
    "an empty assistant turn": {"messages": [CHAT[0], {"role": "assistant", "content": None}]},
    "an empty turn": {"turns": [""]},
    "no text": {"text": "\n"},
    "a conversation without messages": {"messages": []},
    "a message of an unknown role": {"messages": [{"role": "narrator", "content": "x"}]},
    "content that is not text": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "tool calls, which are not supported": {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{}]}]},
    "output is not text": {"prompt": "hi", "output": 3},
    "a response that is an error": {"request": {"prompt": "hi"}, "response": {"error": "overloaded"}},
    "a request without messages or prompt": {"request": {"model": "m"}},
    "more outputs than turns": {"turns": ["a"], "outputs": ["b", "c"]},
    "text with a lone surrogate": {"text": "\ud800"},
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_unusable_row_is_counted_with_its_reason_and_place(tmp_path, reason):
    path = write(tmp_path / "file.jsonl", [{"text": "a"}, UNUSABLE[reason]])
    report = ReadReport()
    assert len(list(read_records([path], report=report))) == 1
    assert {name: tally.count for name, tally in report.skipped.items()} == {reason: 1}
    assert report.skipped[reason].places[0].startswith(f"{path} row 2")
    assert json.loads(json.dumps(report.to_json()))["skipped"][reason]["count"] == 1


def test_report_keeps_the_first_places_and_counts_all(tmp_path):
    path = write(tmp_path / "file.jsonl", [{"text": "a"}] + [{"label": i} for i in range(9)])
    report = ReadReport()
    list(read_records([path], report=report))
    tally = report.skipped["no known field"]
    assert (tally.count, len(tally.places)) == (9, 3)
    assert report.lines()[0] == "10 rows read, 1 used, 9 skipped"


def test_what_was_left_aside_in_a_usable_row_is_noted(tmp_path):
    cut = {"request": {"prompt": "hi"}, "response": {"choices": [{"text": "y", "finish_reason": "length"}]}}
    two = {"request": {"prompt": "hi"}, "response": {"choices": [{"text": "y"}, {"text": "z"}]}}
    report = ReadReport()
    list(read_records([write(tmp_path / "file.jsonl", [cut, two])], report=report))
    assert {name: tally.count for name, tally in report.notes.items()} == {
        "an answer that was cut at its length limit": 1,
        "more than one choice: the first was read": 1,
    }


def test_duplicate_ids_are_counted_per_file_and_both_rows_kept(tmp_path):
    rows = [{"id": "x", "text": "a"}, {"id": "x", "text": "b"}]
    write(tmp_path / "one.jsonl", rows)
    write(tmp_path / "two.jsonl", rows[:1])
    report = ReadReport()
    assert [record.id for record in read_records(tmp_path, report=report)] == ["x", "x", "x"]
    assert report.duplicate_ids == 1


@pytest.mark.parametrize("rows", [[], [{"label": 1}]])
def test_source_without_a_usable_row_is_an_error(tmp_path, rows):
    good, bad = write(tmp_path / "good.jsonl", [{"text": "a"}]), write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=r"bad\.jsonl: no usable row"):
        list(read_records([good, bad]))


@pytest.mark.parametrize(
    "name", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "a/b.jsonl", "in/x"]
)
def test_path_that_does_not_exist_is_one_error_before_any_network(name, monkeypatch, tmp_path):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *a, **k: pytest.fail("network")))
    with pytest.raises(ValueError, match="no such file or folder"):
        read_records([name])


def test_unknown_kind_of_file_and_wrong_arguments_are_refused(tmp_path):
    (tmp_path / "file.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="unknown kind of file"):
        read_records(tmp_path / "file.bin")
    with pytest.raises(ValueError, match="no file in this folder"):
        read_records(tmp_path)
    path = write(tmp_path / "file.jsonl", [{"text": "a"}])
    for wrong in ({"limit": 0}, {"on_bad": "ignore"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            read_records(path, **wrong)
    with pytest.raises(ValueError, match="no data"):
        read_records([])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compression_is_an_error_not_an_end(tmp_path, suffix):
    import zstandard

    lines = "".join(json.dumps({"text": f"{i} {i * 7919}"}) + "\n" for i in range(5000)).encode()
    data = gzip.compress(lines) if suffix == ".gz" else zstandard.ZstdCompressor().compress(lines)
    (tmp_path / f"file.jsonl{suffix}").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged after row"):
        list(read_records(tmp_path / f"file.jsonl{suffix}"))


def test_broken_parquet_is_one_clear_error(tmp_path):
    (tmp_path / "file.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        list(read_records(tmp_path / "file.parquet"))


def test_parquet_timestamps_are_times(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": "a", "timestamp": datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "file.parquet")
    assert [record.time for record in read_records(tmp_path / "file.parquet")] == [1.7e9]


def test_jsonl_is_streamed(tmp_path):
    path = tmp_path / "large.jsonl"
    with open(path, "w") as file:
        for i in range(3000):
            file.write(json.dumps({"text": f"{i}" * 2000}) + "\n")
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < path.stat().st_size / 10


def test_hub_data_set_is_streamed_with_its_split(monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [record.id for record in read_records(["own/set:test[:2]", "own/set"])] == [
        "set:test[:2]-1", "set:test[:2]-2", "set-1", "set-2",
    ]  # fmt: skip
    list(read_records("own/set", split="dev"))
    assert asked == [("own/set", "test[:2]", True), ("own/set", "train", True), ("own/set", "dev", True)]


def test_hub_errors_are_one_line(monkeypatch):
    def load_dataset(name, split, streaming):
        raise FileNotFoundError("no such data set\nand much more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"cannot be read: no such data set$"):
        list(read_records("own/set"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"draftsmith\[train\]"):
        list(read_records("own/set"))


ANSWER = {
    "question_id": 81, "category": "writing", "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"],
    "new_tokens": [3, 4], "wall_time": [0.5, 1], "decoding_steps": [2, 2], "accept_lengths": [2, 1, 2, 2]}],
}  # fmt: skip


def test_spec_bench_answers_are_read_as_answers(tmp_path):
    (record,) = read_records([write(tmp_path / "answers.jsonl", [ANSWER])])
    assert (record.kind, record.answers, record.questions) == ("answer", ["a", "b"], [])


def test_importing_the_reader_loads_nothing_heavy():
    heavy = ["transformers", "datasets", "pyarrow", "zstandard", "fastchat"]
    ours = "draftsmith.infer.text.records, draftsmith.infer.text.templates"
    code = f"import sys, {ours}; print([m for m in %r if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_reader_closes_what_it_opened(tmp_path):
    path = write(tmp_path / "file.jsonl", [{"text": str(i)} for i in range(10)])
    records = read_records(path)
    next(records)
    records.close()  # a file left open would be a ResourceWarning, and warnings are errors
