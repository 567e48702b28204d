"""Traces as columns give the figures of the objects; best and worst questions; answers split into tokens."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.measure.answer_files import TraceRow, read_answers, write_traces
from draftsmith.infer.measure.metrics import Totals
from draftsmith.infer.measure.report import traces as report_traces
from draftsmith.infer.measure.report.traces import examples, find_tokenizer, pieces, read_steps

numbers = st.integers(0, 40)
times = st.floats(0.001, 1.0)


@st.composite
def rows(draw):
    """A question's steps; sources differ from step to step."""
    count = draw(st.integers(1, 5))
    question, choice, turn = draw(st.sampled_from([1, "a/b", "ü"])), draw(st.integers(0, 1)), draw(st.integers(0, 2))
    made = []
    for step in range(count):
        sources = [*draw(st.lists(st.sampled_from(["rest", "pld"]), max_size=3)), "target"]
        trace = StepTrace(
            row=f"{question}/{turn}",
            step=step,
            batch=draw(st.integers(1, 4)),
            context=draw(st.integers(1, 5000)),
            nodes=draw(numbers),
            trials=0,
            depth=0,
            accepted=len(sources) - 1,
            committed=len(sources),
            committed_sources=sources,
            propose_s=draw(times),
            score_s=draw(times),
            target_forward_s=draw(times),
        )
        made.append(TraceRow(question, choice, turn, trace))
    return made


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.lists(rows(), min_size=1, max_size=6), st.sampled_from([900, 4000, 1 << 23]))
def test_columns_give_the_totals_and_sources_of_the_objects(tmp_path, monkeypatch, answers, block):
    monkeypatch.setattr(report_traces, "BLOCK", block)
    written = [row for rows in answers for row in rows]
    path = tmp_path / "traces.jsonl.gz"
    write_traces(path, written)
    steps = read_steps(path)
    assert len(steps) == len(written)
    for number, (key, choice) in enumerate(steps.answers):
        own = [row.trace for row in written if (row.trace.row, row.choice) == (key, choice)]
        found, wanted = steps.totals(steps.answer_S, len(steps.answers))[number], Totals.of(own)
        names = ("steps", "committed", "accepted", "nodes", "hits", "passes", "decode_s", "target_s", "draft_s")
        assert [getattr(found, name) for name in names] == pytest.approx([getattr(wanted, name) for name in names])
        assert steps.step_sources(number) == [trace.committed_sources for trace in own]
        assert steps.question_ids()[number] == key.rpartition("/")[0]


def test_a_group_below_zero_counts_nowhere(tmp_path, trace):
    path = tmp_path / "traces.jsonl.gz"
    write_traces(path, [TraceRow(1, 0, 0, trace(row="1/0", committed=2)), TraceRow(1, 0, 0, trace(row="1/0"))])
    (only,) = read_steps(path).totals(np.array([-1, 0]), 1)
    assert (only.steps, only.committed) == (1, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no traces"),
        ('{"question_id": 1, "choice": 0, "turn": 0, "trace": {"row": "1/0"}}\n', "not a trace (no batch)"),
        ('{"half', "cannot be read as traces"),
        ('{"choice": "first", "trace": null}\n', "cannot be read as traces"),
    ],
)
def test_what_is_no_trace_is_refused_with_the_files_name(tmp_path, text, says):
    path = tmp_path / "small.jsonl.gz"
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match=r"small\.jsonl\.gz") as told:
        read_steps(path)
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_a_trace_without_a_source_for_each_token_is_refused(tmp_path, trace):
    row = TraceRow(1, 0, 0, trace(row="1/0", committed=2)).to_json()
    row["trace"]["committed_sources"] = ["target"]
    path = tmp_path / "traces.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    with pytest.raises(ValueError, match=r"len\(committed_sources\) != committed"):
        read_steps(path)


def test_a_file_that_is_not_compressed_is_refused(tmp_path):
    path = tmp_path / "traces.jsonl.gz"
    path.write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as traces"):
        read_steps(path)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, so that a letter beyond ASCII has several."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


@pytest.mark.parametrize("text", ["plain", "naïve – ü", "日本語", "<script>alert('x')</script>", "a\n\n\tb", ""])
def test_pieces_join_to_the_text_and_a_letter_belongs_to_its_last_token(tokenizer, text):
    ids = list(text.encode())
    found = pieces(tokenizer, ids, text)
    assert "".join(found) == text
    assert len(found) == len(ids)
    assert all(piece == "" or len(piece) == 1 for piece in found)


def test_a_beginning_is_taken_apart_as_far_as_it_goes(tokenizer):
    text = "aü" * 20
    assert pieces(tokenizer, list(text.encode())[:5], text, cut=True) == ["a", "", "ü", "a"]


def test_another_tokenizers_text_is_not_taken_apart(tokenizer):
    assert pieces(tokenizer, [104, 105], "ho") is None


def test_best_and_worst_are_by_accepted_length_and_tokens_keep_their_source(tokenizer, tmp_path, trace):
    lengths = {"a": 4, "b": 1, "c": 2, "d": 3}
    rows, answers = [], []
    for question_id, length in lengths.items():
        for _ in range(6):
            rows.append(TraceRow(question_id, 0, 0, trace(row=f"{question_id}/0", committed=length)))
        text = question_id * 6 * length
        choice = f'{{"turns": ["{text}"], "token_ids": [{list(text.encode())}]}}'
        answers.append(f'{{"question_id": "{question_id}", "category": "qa", "choices": [{choice}]}}')
    write_traces(tmp_path / "t.jsonl.gz", rows)
    (tmp_path / "a.jsonl").write_text("\n".join(answers))
    steps = read_steps(tmp_path / "t.jsonl.gz")
    totals = dict(zip(steps.question_ids(), steps.totals(steps.answer_S, 4)))
    plain = {"a": totals["b"]}
    found = examples(steps, read_answers(tmp_path / "a.jsonl"), totals, plain, {"a": ["why?"]}, tokenizer)
    assert [(one.best, one.question_id, one.accepted_length) for one in found] == [
        (True, "a", 4.0),
        (True, "d", 3.0),
        (False, "c", 2.0),
        (False, "b", 1.0),
    ]
    best = found[0].turns[0]
    assert best.prompt == "why?"
    assert [(piece.text, piece.source, piece.begins) for piece in best.pieces[:5]] == [
        ("a", "draft", True),
        ("a", "draft", False),
        ("a", "draft", False),
        ("a", "target", False),
        ("a", "draft", True),
    ]
    assert found[0].speedup == pytest.approx(4.0)
    assert found[1].speedup is None
    assert not found[0].whole
    (whole,) = {one.whole for one in examples(steps, read_answers(tmp_path / "a.jsonl"), totals, plain, {}, None)}
    assert whole


def test_a_tokenizer_is_found_in_a_folder_and_never_fetched(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert find_tokenizer(str(tmp_path)).decode([104, 105]) == "hi"
    assert find_tokenizer(str(tmp_path / "elsewhere")) is None
    assert find_tokenizer("nobody/has-fetched-this") is None
