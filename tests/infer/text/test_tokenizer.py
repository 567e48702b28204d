"""Tokenizers: what identifies one, and which paths are refused."""

from __future__ import annotations

import pytest
from small_tokenizer import make_tokenizer

from draftsmith.infer.text.tokenizer import load_tokenizer, tokenizer_fingerprint


def test_tokenizer_fingerprint_is_that_of_the_mapping_not_of_template_or_padding(tmp_path):
    one, other = make_tokenizer(), make_tokenizer(None)
    other.model_max_length = 17
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 999}')
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(load_tokenizer(tmp_path))
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(make_tokenizer(sentences=["zebras zigzag"] * 9))


def test_tokenizer_fingerprint_sees_other_splitting_over_the_same_vocabulary():
    from tokenizers import pre_tokenizers

    one, other = make_tokenizer(), make_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert one.get_vocab() == other.get_vocab()
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c", "infer/nowhere"])
def test_tokenizer_path_that_does_not_exist_is_looked_for_nowhere(name, monkeypatch, tmp_path):
    import transformers

    (tmp_path / "infer").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers, "AutoTokenizer", None)
    with pytest.raises(ValueError, match="no such folder"):
        load_tokenizer(name)


def test_folder_without_tokenizer_and_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is a file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
