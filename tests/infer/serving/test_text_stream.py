"""Text comes out whole, as it would be decoded at once, however its tokens arrive."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running_server import WORDS
from tiny_folders import byte_tokenizer

from draftsmith.infer.serving.text_stream import TextStream

TOKENIZER = byte_tokenizer(WORDS * 4)
TEXTS = st.text(st.sampled_from("ab <é🙂東\u200d👩"), max_size=30)


def spaced_tokenizer():
    """Words with a space mark before them, which decoding turns into spaces, but not at the beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁the": 1, "▁fox": 2, "es": 3, "▁": 4, "<end>": 5}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    made.add_special_tokens({"eos_token": "<end>"})
    return made


def in_lots(ids, sizes):
    at = 0
    for size in sizes:
        yield ids[at : at + size]
        at += size
    yield ids[at:]


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, sizes=st.lists(st.integers(0, 4), max_size=12), cut=st.integers(0, 3))
def test_the_pieces_are_the_text_and_no_piece_has_half_a_character(text, sizes, cut):
    ids = TOKENIZER(text)["input_ids"]
    ids = ids[: len(ids) - cut]  # the end may be half a character
    stream = TextStream(TOKENIZER)
    pieces = [stream.add(part) for part in in_lots(ids, sizes)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.add([], "max_new_tokens") == TOKENIZER.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=120), sizes=st.lists(st.integers(0, 9), max_size=12))
def test_tokens_that_make_no_characters_come_out_the_same_in_any_lots(ids, sizes):
    stream, at_once = TextStream(TOKENIZER), TextStream(TOKENIZER)
    text = "".join(stream.add(part) for part in in_lots(ids, sizes)) + stream.add([], "eos")
    assert text == at_once.add(ids, "eos")
    assert text == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS, stops=st.lists(st.text(st.sampled_from("ab <é"), min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_comes_out_before_it_is_known_to_be_none(text, stops):
    ids = TOKENIZER(text)["input_ids"]
    stream, shown = TextStream(TOKENIZER, stops), ""
    for count, token in enumerate(ids, start=1):
        sofar = TOKENIZER.decode(ids[:count])
        found = [stop for stop in stops if stop in sofar]
        shown += stream.add([token], f"stop string {found[0]!r}" if found else "")
        if found:
            assert shown == sofar[: min(sofar.index(stop) for stop in found)]
            return
    assert text.startswith(shown)
    assert shown + stream.add([], "eos") == text


def test_a_stop_that_no_string_caused_shows_what_was_held_back():
    stream = TextStream(TOKENIZER, ["abc"])
    ids = TOKENIZER("xab")["input_ids"]
    assert stream.add(ids) == "x"
    assert stream.add([], "max_new_tokens") == "ab"


def test_spaces_between_words_are_those_of_the_whole_text():
    tokenizer = spaced_tokenizer()
    ids = [1, 2, 3, 5, 1, 4, 2]
    stream = TextStream(tokenizer)
    assert "".join(stream.add([token]) for token in ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_many_bytes_without_a_character_neither_hang_nor_pile_up():
    (lead,) = TOKENIZER.convert_tokens_to_ids(["ð"])  # the first byte of four
    stream = TextStream(TOKENIZER)
    text = "".join(stream.add([lead]) for _ in range(400))
    assert len(text) > 300
    assert len(stream._detokenizer._ids) < 120


@pytest.mark.parametrize(("stop", "offsets"), [("max_new_tokens", [0, 1, 2]), ("stop string 'b'", [0, 1, 2])])
def test_each_token_knows_where_its_text_begins(stop, offsets):
    stream = TextStream(TOKENIZER, ["b"] if "b" in stop else [])
    stream.add(TOKENIZER("<a~")["input_ids"], stop)
    assert stream.offsets == offsets
