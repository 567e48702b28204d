"""Best and worst questions, and answers taken apart into tokens."""

import pytest
from tokenizers import Tokenizer, decoders, models

from draftsmith.infer.measure.answer_files import TraceRow, read_answers, write_traces
from draftsmith.infer.measure.report.examples import examples, find_tokenizer, pieces
from draftsmith.infer.measure.report.traces import read_steps


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
