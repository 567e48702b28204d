"""What is learned is exactly what was emitted, nothing is dropped in silence, and the cache follows the content."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import draftsmith.train.data.corpus as corpus_module
from draftsmith.infer.text.rendering import Rendered
from draftsmith.infer.text.templates import find_template
from draftsmith.train.data.corpus import load_corpus, split, truncate


def load(data, tokenizer, cache, **settings):
    return load_corpus(
        [str(path) for path in data], find_template("chat", tokenizer), cache=cache, **{"max_length": 256, **settings}
    )


def text(tokenizer, ids):
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def test_learned_are_the_answers_and_their_end_tokens_alone(tokenizer, chats, tmp_path):
    corpus = load([chats], tokenizer, tmp_path)
    tokens, mask = corpus.sample(0)
    assert text(tokenizer, tokens).count("</s>") == 2
    learned = text(tokenizer, tokens[mask == 1])
    assert learned == "0 1 2 3 4 5</s>0 1 2 3 4 5</s>"
    assert text(tokenizer, corpus.prompt(0)) == "<|user|>count from 0 in turn 0<|assistant|>"


def test_a_cut_sequence_is_a_prefix_and_its_whole_turns_are_untouched(tokenizer, chats, tmp_path):
    whole = load([chats], tokenizer, tmp_path)
    cut = load([chats], tokenizer, tmp_path, max_length=70)
    assert cut.report["rendering"]["cut"] > 0
    for i in range(len(cut)):
        tokens, mask = cut.sample(i)
        before, learned = whole.sample(i)
        assert len(tokens) <= 70
        assert mask[-1] == 1
        assert np.array_equal(tokens, before[: len(tokens)])
        assert np.array_equal(mask, learned[: len(tokens)])


@pytest.mark.parametrize(
    ("mask", "limit", "left"),
    [([0, 0, 1, 1, 0, 0, 1], 6, 4), ([0, 0, 1], 2, None), ([1, 0, 0], 3, None), ([1, 1], 9, 2), ([0, 0], 5, None)],
)
def test_truncation_leaves_nothing_that_teaches_nothing(mask, limit, left):
    kept = truncate(Rendered(list(range(len(mask))), mask), limit)
    assert (None if kept is None else len(kept.token_ids)) == left


def test_the_cache_is_used_again_until_content_template_or_length_change(tokenizer, chats, tmp_path):
    copy = tmp_path / "chats.jsonl"
    copy.write_bytes(chats.read_bytes())
    cache = tmp_path / "cache"

    def folders():
        return {path.name for path in cache.iterdir()}

    load([copy], tokenizer, cache)
    first = folders()
    load([copy], tokenizer, cache)
    assert folders() == first
    load([copy], tokenizer, cache, max_length=100)
    assert len(folders()) == 2
    copy.write_text(copy.read_text() + json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    load([copy], tokenizer, cache)
    assert len(folders()) == 3
    assert not [name for name in folders() if name.startswith(".")]


@pytest.fixture
def hub(monkeypatch):
    """A data set `own/chats` on a hub: its commit and its rows, and how often the rows were read."""
    there = SimpleNamespace(commit="a" * 40, rows=[], reads=0)

    def load_dataset(name, split, streaming):
        there.reads += 1
        return iter(there.rows)

    def load_dataset_builder(name):
        if not there.commit:
            raise ConnectionError("the hub is not there\nand much more")
        return SimpleNamespace(hash=there.commit)

    fake = SimpleNamespace(load_dataset=load_dataset, load_dataset_builder=load_dataset_builder)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return there


def test_a_data_set_on_the_hub_is_read_again_when_its_commit_is_another(tokenizer, hub, tmp_path):
    def row(text):
        return {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": text}]}

    hub.rows = [row("one")]
    assert len(load(["own/chats"], tokenizer, tmp_path)) == 1
    hub.rows = [row("one"), row("two")]
    assert len(load(["own/chats"], tokenizer, tmp_path)) == 1
    assert hub.reads == 1
    hub.commit = "b" * 40
    assert len(load(["own/chats"], tokenizer, tmp_path)) == 2
    assert len(load(["own/chats:test"], tokenizer, tmp_path)) == 2
    assert hub.reads == 3
    hub.commit = ""
    with pytest.raises(ValueError, match=r"own/chats: .* which commit .* to read: the hub is not there$"):
        load(["own/chats"], tokenizer, tmp_path)


def test_datasets_own_builders_know_their_content(tmp_path):
    """What the fake hub stands in for is there in the library."""
    import datasets

    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    first = datasets.load_dataset_builder(str(tmp_path), cache_dir=str(tmp_path / "cache")).hash
    assert first
    assert isinstance(first, str)


def test_of_two_nodes_that_tokenise_at_once_one_takes_what_the_other_left(tokenizer, chats, tmp_path, monkeypatch):
    def late(*args, **kwargs):
        monkeypatch.undo()
        load([chats], tokenizer, tmp_path)
        return read_records(*args, **kwargs)

    read_records = corpus_module.read_records
    monkeypatch.setattr(corpus_module, "read_records", late)
    assert len(load([chats], tokenizer, tmp_path)) == 40
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_rows_are_counted_named_and_skipped(tokenizer, chats, tmp_path):
    bad = tmp_path / "bad.jsonl"
    first = {"messages": [{"role": "assistant", "content": "hello"}]}
    bad.write_text("{broken\n" + json.dumps(first) + "\n" + chats.read_text())
    corpus = load([bad], tokenizer, tmp_path / "cache")
    assert len(corpus) == 40
    assert sum(entry["count"] for entry in corpus.report["skipped"].values()) == 1
    (refused,) = corpus.report["rendering"]["not_used"].values()
    assert refused["count"] == 1
    assert refused["places"] == [f"{bad} row 2"]


def test_a_corpus_without_a_usable_row_is_an_error_that_says_why(tokenizer, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    with pytest.raises(ValueError, match=r"no usable row.*no answer.*row 1"):
        load([path], tokenizer, tmp_path / "cache")


def test_logged_token_ids_are_learned_as_they_are(tokenizer, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"prompt_token_ids": [5, 6, 7], "token_ids": [9, 8, 2]}) + "\n")
    tokens, mask = load([path], tokenizer, tmp_path / "cache").sample(0)
    assert tokens.tolist() == [5, 6, 7, 9, 8, 2]
    assert mask.tolist() == [0, 0, 0, 1, 1, 1]


def test_held_out_conversations_stay_held_out_as_the_corpus_grows(tokenizer, chats, tmp_path):
    grown = tmp_path / "grown.jsonl"
    more = json.dumps({"messages": [{"role": "user", "content": "new"}, {"role": "assistant", "content": "a"}]})
    grown.write_text(more + "\n" + chats.read_text())
    small, large = load([chats], tokenizer, tmp_path), load([grown], tokenizer, tmp_path)
    train, held = split(small, 0.3)
    assert 4 <= len(held) <= 20
    assert len(train) + len(held) == 40
    later = set(split(large, 0.3)[1].tolist()) - {0}
    assert later == {int(i) + 1 for i in held}


def test_conversations_that_begin_alike_fall_on_one_side(tokenizer, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"q{i % 5}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(50)
    ]
    path = tmp_path / "alike.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = set(split(load([path], tokenizer, tmp_path / "cache"), 0.5)[1].tolist())
    assert all({i, i + 5} <= held or not {i, i + 5} & held for i in range(45))


def test_split_by_time_holds_out_the_newest_and_refuses_rows_without_a_time(make_corpus):
    corpus = make_corpus([5] * 10)
    with pytest.raises(ValueError, match="10 sequences have no time"):
        split(corpus, 0.2, "time")
    corpus.times[:] = [3, 9, 1, 4, 8, 0, 2, 5, 6, 7]
    assert split(corpus, 0.2, "time")[1].tolist() == [1, 4]
